"""How many bytes of tensors are alive at once while something runs: a device's peak, without a device.

On the meta device tensors have sizes and no numbers, so that the largest models run in seconds. What it
cannot see is what kernels take for themselves: workspaces of convolutions and matrix products.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
_ATEN = torch.ops.aten


class LiveBytes:
    """The memory of tensors on the meta device that are made inside, as long as anything holds them.

    Attributes:
        peak: the most that was alive at once.
    """

    def __init__(self) -> None:
        self.peak = self._live = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def hold(self, modules: Iterable[torch.nn.Module]) -> None:
        """Count the weights of ``modules``, too."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.count(tensor)

    @contextmanager
    def counting(self) -> Iterator[None]:
        with _Answers(), _Operations(self):
            yield

    def watched(self, run: Callable[..., Any], peaks: dict[str, int], name: str) -> Callable[..., Any]:
        """``run``, noting in ``peaks`` the most that is alive while it runs, of all times."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            before, self.peak = self.peak, self._live
            try:
                return run(*args, **kwargs)
            finally:
                peaks[name] = max(peaks.get(name, 0), self.peak)
                self.peak = max(self.peak, before)

        return watched

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size_bytes = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self._live -= size_bytes
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self._live += size_bytes
        self.peak = max(self.peak, self._live)


class _Operations(TorchDispatchMode):
    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._made(func, args, kwargs or {})
        # Views of what was there before, weights above all, are not made here.
        given = {id(each.untyped_storage()) for each in _tensors((args, kwargs)) if each.is_meta}
        for tensor in _tensors(made):
            if tensor.is_meta and id(tensor.untyped_storage()) not in given:
                self._live.count(tensor)
        return made

    def _made(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What the operation gives; where it would need numbers, any."""
        packet = func.overloadpacket
        first = next(iter(_tensors(args)), None)
        if first is None or not (first.is_meta or packet is _ATEN.copy_):
            return func(*args, **kwargs)
        if packet is _ATEN._local_scalar_dense:
            return True if first.dtype is torch.bool else 0.5 if first.is_floating_point() else 0
        if packet is _ATEN.nonzero:
            return torch.zeros(1, first.ndim, dtype=torch.int64, device=META)
        if packet is _ATEN.index:  # as if every mask let all through
            return func(first, [index for each in args[1] for index in _indices(each)])
        if packet is _ATEN._to_copy and kwargs.get("device", META) != META:
            return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if packet is _ATEN.copy_ and args[1].is_meta and not first.is_meta:
            return first
        return func(*args, **kwargs)


class _Answers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:  # fused: no matrix of all by all
            query, _, value = (*args, *(kwargs or {}).values())[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        if func is torch.tensor and any(each.is_meta for each in _tensors(args)):
            return torch.full((1,), 0.5)
        return func(*args, **(kwargs or {}))


def _indices(mask: torch.Tensor | None) -> list[torch.Tensor | None]:
    if mask is None or mask.dtype is not torch.bool:
        return [mask]
    return [torch.zeros(mask.numel(), dtype=torch.int64, device=META)] * mask.ndim


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
