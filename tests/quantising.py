"""Quantised files read back as plain numbers by gguf's own code, to compare pictures with."""

from __future__ import annotations

import zlib

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from studio_worker.engine.files.gguf_files import open_gguf, shape_of
from studio_worker.gpu_check.tiny.quantised import Kind
from studio_worker.models import LocalFile

Q8, Q4 = Kind.Q8_0, Kind.Q4_0

DECODING = 0.2
"""By how many grey levels a picture may differ, on average, from that of the numbers that its files decode
to. Decoding in half precision, as diffusers does, is what makes the difference.
"""


def mixed(name: str) -> Kind:
    """The kind of the matrix ``name`` in a file of several, as ``Q4_K_M`` and ``Q5_K_M`` are: what leads in
    and out of the model in half precision (city96's ``tools/convert.py``), some others finer than the rest.
    """
    if any(part in name for part in ("_in.", "embed", "final_layer", "proj_out", "time_")):
        return (Kind.BF16, Kind.F16)[zlib.crc32(name.encode()) % 2]
    return (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0)[zlib.crc32(name.encode()) % 4]


def numbers_of(file: LocalFile) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file, every quantised one as the numbers that gguf's decoder gives."""
    reader = open_gguf(file.path)
    return {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        ).reshape(shape_of(reader, tensor))
        for tensor in reader.tensors
    }


def dequantised(file: LocalFile) -> LocalFile:
    """The same weights in a safetensors file, of plain numbers and under the same names."""
    path = file.path.with_suffix(".dequantised.safetensors")
    save_file(numbers_of(file), path)
    return LocalFile(file.role, path, str(path))


def widened(file: LocalFile, dtype: torch.dtype = torch.float32) -> LocalFile:
    """The same weights as plain numbers."""
    state = load_file(file.path)
    numbers = {
        name: (tensor.float() * state.get(f"{name.removesuffix('.weight')}.scale_weight", 1.0)).to(dtype)
        for name, tensor in state.items()
        if "scale_weight" not in name and name != "scaled_fp8"
    }
    path = file.path.with_suffix(f".{dtype}.safetensors")
    save_file(numbers, path)
    return LocalFile(file.role, path, str(path))
