"""Files of random weights in full size, fast: drawn on the device, written as they come.

Activations keep their size in such a model, so that it computes with ordinary numbers.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import gguf
import numpy as np
import torch

from studio_worker.engine.families.component import Part
from studio_worker.engine.loading import empty_model
from studio_worker.gpu_check.tiny.weights import Tensors
from studio_worker.models import FileRole, LocalFile

_PREFIXES = {"transformers.CLIPTextModel": "text_model.", "transformers.Qwen3Model": "model."}
"""What stands before the library's names in published files, by class."""

_SAFETENSORS_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

Q4_K = gguf.GGMLQuantizationType.Q4_K
_BLOCK, _BLOCK_BYTES = gguf.GGML_QUANT_SIZES[Q4_K]
_PAIR_BYTES = 4
"""Of a block's scale and offset, with which it begins (ggml's ``block_q4_K``)."""
_OFFSET_SHARE = 7.5
"""What share of the scale the offset is where 4-bit numbers, 0 to 15, are to lie around 0."""


def shapes(part: Part) -> Tensors:
    """A component's tensors, without memory, under the names that its files have."""
    prefix = _PREFIXES.get(part.cls, "")
    return {prefix + name: tensor for name, tensor in empty_model(part).state_dict().items()}


class Drawn:
    """Random numbers on ``device``, the same in every run there."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._spread = self._unit_spread()

    def plain(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Numbers for the tensor ``name``: scales near 1, biases near 0, matrices that keep lengths."""
        noise = torch.randn(shape, generator=self._generator, device=self._device, dtype=dtype)
        if len(shape) > 1:
            noise *= 0.8 * math.prod(shape[1:]) ** -0.5
            return noise
        noise *= 0.1
        return noise + 1.0 if name.endswith("weight") else noise

    def blocks(self, shape: torch.Size) -> torch.Tensor:
        """Blocks of Q4_K for a matrix of ``shape``: any bytes are numbers, as large as their scale says."""
        size = (math.prod(shape) // _BLOCK, _BLOCK_BYTES)
        drawn = torch.randint(0, 256, size, generator=self._generator, device=self._device, dtype=torch.uint8)
        scale = 0.8 * shape[-1] ** -0.5 / self._spread
        pair = torch.tensor([scale, _OFFSET_SHARE * scale], dtype=torch.float16).view(torch.uint8)
        drawn[:, :_PAIR_BYTES] = pair.to(self._device)
        return drawn.reshape(shape[0], -1)

    @staticmethod
    def _unit_spread() -> float:
        """How far such numbers spread where the scale is 1."""
        blocks = np.random.default_rng(0).integers(0, 256, (4096, _BLOCK_BYTES), dtype=np.uint8)
        blocks[:, :_PAIR_BYTES] = np.array([1.0, _OFFSET_SHARE], dtype=np.float16).view(np.uint8)
        return float(gguf.quants.dequantize(blocks, Q4_K).std())


def write_plain(path: Path, part: Part, dtype: torch.dtype, drawn: Drawn) -> LocalFile:
    """``part`` as a safetensors file of ``dtype``."""
    named = shapes(part)
    header: dict[str, object] = {}
    end = 0
    for name, empty in named.items():
        start, end = end, end + empty.numel() * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[dtype],
            "shape": list(empty.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, empty in named.items():
            numbers = drawn.plain(name, empty.shape, dtype).reshape(-1)
            numbers.view(torch.uint8).cpu().numpy().tofile(file)
    return LocalFile(part.role, path, str(path))


def write_q4_k(path: Path, role: FileRole, architecture: str, named: Tensors, drawn: Drawn) -> LocalFile:
    """Tensors of these names and shapes as a GGUF file: matrices of whole blocks as Q4_K, the rest as F32."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, empty in named.items():
        if _is_blocks(empty.shape):
            in_bytes = (empty.shape[0], empty.shape[1] // _BLOCK * _BLOCK_BYTES)
            writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), Q4_K)
        else:
            writer.add_tensor_info(name, tuple(empty.shape), np.dtype(np.float32), 4 * empty.numel())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, empty in named.items():
        is_blocks = _is_blocks(empty.shape)
        made = drawn.blocks(empty.shape) if is_blocks else drawn.plain(name, empty.shape, torch.float32)
        writer.write_tensor_data(made.cpu().numpy())
    writer.close()
    return LocalFile(role, path, str(path))


def _is_blocks(shape: torch.Size) -> bool:
    return len(shape) == 2 and shape[1] % _BLOCK == 0
