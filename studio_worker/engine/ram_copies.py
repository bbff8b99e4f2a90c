"""Weights between RAM and the device: what comes from RAM stays there too, so that leaving copies nothing.

While a component is on the device, its tensors are the device's; what they were in RAM is kept, and is what
they are again when it leaves. Weights are never changed in place: numbers that compute in another type for a
while (a VAE's) are back in the kept one afterwards. This module knows tensors, and neither plans nor models.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

RamCopy = dict[torch.Tensor, torch.Tensor]
"""A component's parameters and buffers (which stay the same objects) to what they are in RAM."""


def weights(module: torch.nn.Module, *, recurse: bool = True) -> Iterator[torch.Tensor]:
    """The parameters and buffers of ``module``; with LoRAs in it, theirs too."""
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def to_device(module: torch.nn.Module, device: torch.device) -> RamCopy:
    """Bring a component from RAM to ``device``; what it was in RAM, for :func:`to_ram`.

    Where that fails the component is in RAM.
    """
    copy = {tensor: tensor.data for tensor in weights(module)}
    try:
        for tensor, kept in copy.items():
            tensor.data = kept.to(device, non_blocking=True)
        if device.type == "cuda":  # the copies read RAM that may be gone after this
            torch.cuda.current_stream(device).synchronize()
    except BaseException:
        _point_back(copy)
        raise
    return copy


def to_ram(module: torch.nn.Module, copy: RamCopy | None = None) -> None:
    """Let a component leave the device, for ``copy`` as far as that has its tensors."""
    known = copy or {}
    # All are there before any is used, so that a component is not half here and half there if RAM runs out.
    whole = {tensor: known[tensor] if tensor in known else tensor.data.cpu() for tensor in weights(module)}
    _point_back(whole)


def _point_back(copy: RamCopy) -> None:
    for tensor, kept in copy.items():
        tensor.data = kept
