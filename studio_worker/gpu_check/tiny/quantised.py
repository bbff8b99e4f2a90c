"""Quantised files: GGUF of every kind, and 8-bit floats, of tensors that are given.

The gguf library decodes all quantisations and writes some. Of the others (K and IQ) blocks are drawn here:
any bytes in a block's layout are numbers, and which ones, gguf's own decoder says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from studio_worker.models import FileRole, LocalFile

Kind = gguf.GGMLQuantizationType

SCALES: Mapping[gguf.GGMLQuantizationType, tuple[int, int | None, float]] = {
    Kind.Q4_0: (0, None, 0),
    Kind.Q4_1: (0, 2, -7.5),
    Kind.Q5_0: (0, None, 0),
    Kind.Q5_1: (0, 2, -15.5),
    Kind.Q8_0: (0, None, 0),
    Kind.Q2_K: (80, 82, 1.5),
    Kind.Q3_K: (108, None, 0),
    Kind.Q4_K: (0, 2, 7.5),
    Kind.Q5_K: (0, 2, 15.5),
    Kind.Q6_K: (208, None, 0),
    Kind.IQ4_NL: (0, None, 0),
    Kind.IQ4_XS: (0, None, 0),
}
"""Where a block has its half-precision scale and its offset (ggml's ``ggml-common.h``), in bytes, and which
share of the scale the offset is where the numbers lie around 0.
"""

WRITTEN = {Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0}
"""What gguf 0.19 can write."""


def drawn_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Bytes of blocks for a tensor of ``shape``, whose numbers are so large that activations keep their
    size.
    """
    elements, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(seed)
    count = int(np.prod(shape)) // elements
    blocks = drawn.integers(0, 256, (count, size_bytes), dtype=np.uint8)
    at, offset_at, share = SCALES[kind]

    def scaled(scales: np.ndarray) -> np.ndarray:
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
        if offset_at is not None:
            blocks[:, offset_at : offset_at + 2] = (share * scales).astype(np.float16).view(np.uint8)
        return blocks

    spread = float(gguf.quants.dequantize(scaled(np.ones((count, 1))), kind).std())
    scales = drawn.uniform(0.5, 1.5, (count, 1)) / spread / shape[-1] ** 0.5
    return scaled(scales).reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    role: FileRole,
    state: Mapping[str, torch.Tensor],
    architecture: str,
    kind: gguf.GGMLQuantizationType | Callable[[str], gguf.GGMLQuantizationType] | None = None,
    stated: Mapping[str, float | str | int] = MappingProxyType({}),
) -> LocalFile:
    """``state`` as a GGUF file, as llama.cpp's and city96's tools write it: matrices as ``kind`` where their
    rows are whole blocks, everything else in single precision. ``None`` keeps all in single precision.

    Matrices of a kind that gguf does not write are other ones, drawn by their names.

    Args:
        kind: for all matrices, or for each by its name (``mixed``).
        stated: further metadata, by their names without the architecture; :func:`piece` has others.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in stated.items():
        if isinstance(value, int):
            writer.add_uint16(name, value)
        else:
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(f"{architecture}.{name}", value)
    for name, tensor in state.items():
        numbers = tensor.detach().float().numpy()
        chosen = kind(name) if callable(kind) and not isinstance(kind, Kind) else kind
        if chosen is None or numbers.ndim != 2 or numbers.shape[1] % gguf.GGML_QUANT_SIZES[chosen][0]:
            writer.add_tensor(name, numbers)
        elif chosen in WRITTEN:
            writer.add_tensor(name, gguf.quants.quantize(numbers, chosen), raw_dtype=chosen)
        else:
            blocks = drawn_blocks(chosen, numbers.shape, zlib.crc32(name.encode()))
            writer.add_tensor(name, blocks, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return LocalFile(role, path, str(path))


def without_outer_ones(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` as stable-diffusion.cpp's converter has it, which leaves out outer dimensions of size 1 (its
    ``ggml_n_dims``); city96's keeps them.
    """
    return {name: tensor.reshape(_inner(tensor.shape)) for name, tensor in state.items()}


def _inner(shape: Sequence[int]) -> Sequence[int]:
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def piece(number: int, count: int) -> dict[str, int]:
    """What ``llama-gguf-split`` of llama.cpp states in each piece of a file."""
    return {gguf.Keys.Split.LLM_KV_SPLIT_NO: number, gguf.Keys.Split.LLM_KV_SPLIT_COUNT: count}


def write_eight_bit(
    path: Path,
    role: FileRole,
    state: Mapping[str, torch.Tensor],
    scale: str = "{}.scale_weight",
    kind: torch.dtype = torch.float8_e4m3fn,
) -> LocalFile:
    """``state`` as a safetensors file with matrices of 8-bit floats, as published for ComfyUI.

    Source: https://github.com/comfyanonymous/ComfyUI (comfy/ops.py, comfy/quant_ops.py).

    Args:
        scale: what the scale of a layer's matrix is called; an empty text writes them without scales.
    """
    written: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim != 2:
            written[name] = tensor
            continue
        factor = tensor.abs().max() / torch.finfo(kind).max if scale else torch.tensor(1.0)
        written[name] = (tensor / factor).to(kind)
        if scale:
            written[scale.format(name.removesuffix(".weight"))] = factor.float()
    if scale:
        written["scaled_fp8"] = torch.zeros(2, dtype=kind)
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, path)
    return LocalFile(role, path, str(path))


def llama_cpp(
    tensors: Mapping[str, torch.Tensor], architecture: gguf.MODEL_ARCH, blocks: int
) -> dict[str, torch.Tensor]:
    """``tensors`` (transformers' names) under the names of llama.cpp's converter; others are left out."""
    names = gguf.get_tensor_name_map(architecture, blocks)
    renamed = {
        (names.get_name(name.rpartition(".")[0]), name.rpartition(".")[2]): tensor
        for name, tensor in tensors.items()
    }
    return {f"{module}.{leaf}": tensor for (module, leaf), tensor in renamed.items() if module is not None}
