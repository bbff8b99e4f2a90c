"""Tiny models in quantised files of every kind, and read back as plain numbers by gguf's own code."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
from safetensors.torch import load_file, save_file

from studio_worker.engine.files.gguf_files import open_gguf, shape_of
from studio_worker.gpu_check.tiny.model import Published, Tiny
from studio_worker.gpu_check.tiny.quantised import Kind, without_outer_ones, write_eight_bit, write_gguf
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


KINDS = sorted(SUPPORTED_GGUF_QUANT_TYPES)


def any_kind(name: str) -> Kind:
    """A quantisation for the matrix ``name``; a model of some hundred has every one that is served."""
    return Kind(KINDS[zlib.crc32(name.encode()) % len(KINDS)])


def in_every_kind(published: Published, folder: Path) -> LocalFile | None:
    if not published.architecture:
        return published.write(folder)
    tensors = published.tensors if published.in_gguf is None else published.in_gguf
    path = folder / f"{published.name}-kinds.gguf"
    if published.role == "model":
        tensors = without_outer_ones(tensors)
    return write_gguf(path, published.role, tensors, published.architecture, any_kind)


def in_eight_bit(published: Published, folder: Path) -> LocalFile | None:
    return published.write(folder, "8-bit")


def in_eight_bit_unscaled(published: Published, folder: Path) -> LocalFile | None:
    if published.scale is None:
        return published.write(folder)
    path = folder / f"{published.name}-unscaled.safetensors"
    return write_eight_bit(path, published.role, published.tensors, "")


WRITERS: dict[str, Callable[[Published, Path], LocalFile | None]] = {
    "GGUF of every kind": in_every_kind,
    "8-bit with scales": in_eight_bit,
    "8-bit without": in_eight_bit_unscaled,
}


def written(model: Tiny, form: str) -> tuple[LocalFile, ...]:
    """The files of ``model``, by one of :data:`WRITERS`."""
    found = (WRITERS[form](each, model.folder) for each in model.published.values())
    return tuple(file for file in found if file is not None)
