"""Headers of safetensors files, odd ones too."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from studio_worker.models import LocalFile


def with_metadata(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Any, padding: int = 0
) -> LocalFile:
    """A safetensors file whose metadata may be anything that JSON has; bytes are passed on as they are."""
    header: dict[str, Any] = {}
    content = b""
    for name, tensor in tensors.items():
        own = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = {
            torch.float32: "F32",
            torch.float16: "F16",
            torch.bfloat16: "BF16",
            torch.float8_e4m3fn: "F8_E4M3",
        }
        offsets = [len(content), len(content) + len(own)]
        header[name] = {"dtype": kind[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        content += own
    said = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    whole = b'{"__metadata__":' + said + b"," + json.dumps(header).encode()[1:] + b" " * padding
    path.write_bytes(struct.pack("<Q", len(whole)) + whole + content)
    return LocalFile("vae", path, str(path))
