"""Weights between RAM and the device: what comes from RAM stays there too, so that leaving copies nothing.

While a component is on the device, its tensors are the device's; what they were in RAM is kept, and is what
they are again when it leaves. Weights are never changed in place: numbers that compute in another type for a
while (a VAE's) are back in the kept one afterwards. This module knows tensors, and neither plans nor models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from studio_worker.box.process import give_memory_back
from studio_worker.engine.memory.pinned import PinnedMemory

RamCopy = MutableMapping[torch.Tensor, torch.Tensor]
"""A component's parameters and buffers (which stay the same objects) to what they are in RAM."""

_ALIGNED_BYTES = 64
"""As torch aligns its own tensors: libraries sum in another order where numbers do not begin so."""

_AT_A_TIME_BYTES = 256 << 20


def ram_copy(of: Mapping[torch.Tensor, torch.Tensor]) -> RamCopy:
    """``of``, without keeping tensors on the device that a component has no more: a LoRA's, taken out."""
    return WeakIdKeyDictionary(of)


def weights(module: torch.nn.Module, *, recurse: bool = True) -> Iterator[torch.Tensor]:
    """The parameters and buffers of ``module``; with LoRAs in it, theirs too."""
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def to_device(module: torch.nn.Module, device: torch.device) -> RamCopy:
    """Bring a component from RAM to ``device``; what it was in RAM, for :func:`to_ram`.

    Where that fails the component is in RAM.
    """
    copy = ram_copy({tensor: tensor.data for tensor in weights(module)})
    try:
        for tensor, kept in copy.items():
            tensor.data = kept.to(device, non_blocking=True)
        _finish_copies(device)  # they read RAM that may be gone after this
    except BaseException:
        _point_to(copy)
        raise
    return copy


def to_ram(
    module: torch.nn.Module, device: torch.device, copy: RamCopy | None, pinned: PinnedMemory | None = None
) -> None:
    """Let a component leave ``device`` for ``copy``, and what has none there for RAM that is ``pinned`` where
    there is room. Where that fails the component is on the device.
    """
    known = {} if copy is None else copy
    new = [tensor for tensor in weights(module) if tensor not in known and tensor.device == device]
    copied = _copied(new, pinned)
    _finish_copies(device)
    _point_to(known)
    _point_to(dict(zip(new, copied, strict=True)))


def pin(module: torch.nn.Module, pinned: PinnedMemory) -> None:
    """Have the weights of a component in RAM pinned, if there is room for all of them."""
    tensors = list(weights(module))
    block = pinned.block(_size_bytes(tensors))
    if block is None:
        return
    moved_bytes = 0
    for tensor, view in zip(tensors, _views(block, tensors), strict=True):
        view.copy_(tensor.data)
        tensor.data = view
        moved_bytes += tensor.nbytes
        if moved_bytes > _AT_A_TIME_BYTES:  # else they would lie in RAM twice: what was freed is kept
            give_memory_back()
            moved_bytes = 0


def _copied(tensors: Sequence[torch.Tensor], pinned: PinnedMemory | None) -> list[torch.Tensor]:
    block = None if pinned is None else pinned.block(_size_bytes(tensors))
    if block is None:
        return [tensor.data.cpu() for tensor in tensors]
    views = list(_views(block, tensors))
    for tensor, view in zip(tensors, views, strict=True):
        view.copy_(tensor.data, non_blocking=True)
    return views


def _views(block: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """A place in ``block`` for each of ``tensors``, laid out as it is."""
    start = 0
    for tensor in tensors:
        strides = torch.empty_like(tensor.data, device="meta").stride()
        place = block[start : start + tensor.nbytes].view(tensor.dtype)
        yield place.as_strided(tensor.shape, strides)
        start += _aligned(tensor.nbytes)


def _size_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _finish_copies(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _point_to(copy: Mapping[torch.Tensor, torch.Tensor]) -> None:
    for tensor, kept in copy.items():
        tensor.data = kept
