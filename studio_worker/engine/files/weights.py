"""The tensors of a weights file, onto a device: safetensors memory-mapped, GGUF as it is quantised.

It renames nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gguf
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors import SafetensorError

from studio_worker.engine.files.eight_bit import EightBitMatrix
from studio_worker.engine.files.gguf_files import DAMAGE, PLAIN_TYPES, open_gguf
from studio_worker.engine.files.reading import reading
from studio_worker.engine.files.safetensors_files import open_safetensors
from studio_worker.engine.files.sections import Section, Tensors
from studio_worker.engine.files.types import FP8_NOTE, check_types
from studio_worker.errors import FileDamaged

_AT_A_TIME_BYTES = 4 << 20
"""Of blocks that are multiplied out while a file is read, which takes some twenty times as much."""


def read_tensors(
    section: Section,
    device: torch.device,
    dtype: torch.dtype,
    alive: Callable[[], object] = lambda: None,
) -> Tensors:
    """All tensors of ``section``, names without its prefix, on ``device``.

    Plain numbers are as they are stored, but no wider than ``dtype``; quantised ones are diffusers'
    ``GGUFParameter``, and matrices of 8-bit floats ``EightBitMatrix``, whose bytes are those of the file.

    Args:
        alive: called after each tensor; what it raises ends the reading.

    Raises:
        FileDamaged: the file is not whole.
        JobError: the disk does not give it.
        NotServed: it has weights of a type that is not served.
    """
    if section.shards:
        return {
            name: tensor
            for shard in section.shards
            for name, tensor in read_tensors(shard, device, dtype, alive).items()
        }
    path = section.checkpoint.path
    check_types(section)
    try:
        with reading(path):
            if section.checkpoint.format == "gguf":
                return dict(_gguf(section, device, alive))
            # Mapped: on the CPU these tensors are pages of the file until they are copied.
            with open_safetensors(path, str(device)) as file:
                return _safetensors(section, file, dtype, alive)
    except (SafetensorError, *DAMAGE) as error:
        raise FileDamaged(path, f"{path.name} cannot be read: {type(error).__name__}") from error


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as numbers, where it is blocks of them; for what must be transposed, say."""
    if isinstance(tensor, EightBitMatrix):
        return tensor.widened(torch.float32)
    return _multiplied_out(tensor) if isinstance(tensor, GGUFParameter) else tensor


def dequantised(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` as plain numbers of ``dtype``, in memory of its own."""
    if isinstance(tensor, GGUFParameter):
        return _multiplied_out(tensor, dtype)
    tensor = plain(tensor)
    # A mapped file's tensors begin where the file has them; BLAS sums in another order where they are not
    # aligned, and the same seed would make another picture. Also, a file that is cut short cannot kill us.
    return tensor.to(dtype, copy=tensor.device.type == "cpu")


def _multiplied_out(blocks: GGUFParameter, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The numbers of ``blocks``, some rows at a time: in one go a vocabulary of Qwen's takes gigabytes."""
    rows = blocks.as_tensor()
    if rows.ndim == 1:
        whole: torch.Tensor = dequantize_gguf_tensor(blocks)
        return whole.to(dtype)
    count = max(1, _AT_A_TIME_BYTES // rows[0].numel())
    pieces = (GGUFParameter(each, quant_type=blocks.quant_type) for each in rows.split(count))
    first = dequantize_gguf_tensor(next(pieces))
    numbers: torch.Tensor = first.new_empty(blocks.quant_shape, dtype=dtype)
    numbers[:count] = first
    for index, piece in enumerate(pieces, 1):
        numbers[index * count : (index + 1) * count] = dequantize_gguf_tensor(piece)
    return numbers


def _safetensors(section: Section, file: Any, dtype: torch.dtype, alive: Callable[[], object]) -> Tensors:
    tensors: Tensors = {}
    for name in section.loaded:
        alive()
        if FP8_NOTE.search(name):
            continue
        tensor = file.get_tensor(section.prefix + name)
        if tensor.is_floating_point() and tensor.element_size() == 1:
            scale = section.scale_of(name)
            factor = torch.ones(1) if scale is None else file.get_tensor(section.prefix + scale).float()
            if section.stays_eight_bit(name):
                tensor = EightBitMatrix.of(tensor, factor.item())
            else:
                by_row = factor.to(tensor.device).reshape(-1, *[1] * (tensor.ndim - 1))
                tensor = (tensor.float() * by_row).to(dtype)
        elif tensor.is_floating_point() and tensor.element_size() > dtype.itemsize:
            tensor = tensor.to(dtype)  # at once, so that a file of wide numbers never lies whole in memory
        tensors[name] = tensor
    return tensors


def _gguf(
    section: Section, device: torch.device, alive: Callable[[], object]
) -> Iterator[tuple[str, torch.Tensor]]:
    loaded = set(section.loaded)
    for tensor in open_gguf(section.checkpoint.path, "c").tensors:
        alive()
        name = tensor.name.removeprefix(section.prefix)
        if not tensor.name.startswith(section.prefix) or name not in loaded:
            continue
        numbers = torch.from_numpy(tensor.data).to(device)
        shape = section.shapes[name]
        if tensor.tensor_type.name in PLAIN_TYPES:
            yield name, numbers.reshape(shape)
            continue
        elements, size_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        if shape[-1] % elements == 0:
            rows = numbers.reshape(*shape[:-1], shape[-1] // elements * size_bytes)
            yield name, GGUFParameter(rows, quant_type=tensor.tensor_type)
        else:  # blocks that go over the ends of rows cannot stay as they are
            yield name, plain(GGUFParameter(numbers, quant_type=tensor.tensor_type)).reshape(shape)
