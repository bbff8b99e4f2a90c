"""Components that come to the device only while they work, for one job at a time.

They come when a module of theirs is called, which plain forward hooks of torch tell, and leave for the RAM
that they came from. What does not run in a job does not come, and after it no trace of this is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from studio_worker.engine.memory.placement import Mode, Plan
from studio_worker.engine.memory.ram_copies import RamCopy, to_device, to_ram, weights

Parts = Mapping[str, torch.nn.Module | None]
"""Components by their names, as they are loaded: what a pipeline makes one of is several here."""

Bring = Callable[[torch.nn.Module], None]
"""Has a component come to the device now: a VAE, before its numbers are widened where it computes."""


@contextmanager
def placed(parts: Parts, plan: Plan, device: torch.device) -> Iterator[Bring]:
    """Inside, the components ``parts`` are where ``plan`` says, and the VAE among them decodes as it says.

    After it, those of a plan that is not for the whole model are in RAM, without any trace of this.
    """
    vae: Any = parts.get("vae")
    if plan.tiled and vae is not None:
        vae.enable_tiling()
    try:
        if plan.mode is Mode.WHOLE:
            yield lambda _: None
        else:
            with _one_by_one(parts, plan.mode, device) as bring:
                yield bring
    finally:
        if plan.tiled and vae is not None:
            vae.disable_tiling()


@contextmanager
def _one_by_one(parts: Parts, mode: Mode, device: torch.device) -> Iterator[Bring]:
    visitors: dict[torch.nn.Module, _Visitor] = {
        # A VAE is small, and changes its precision while it works.
        module: _Layers(module, device) if mode is Mode.LAYERS and name != "vae" else _Whole(module, device)
        for name, module in parts.items()
        if module is not None
    }
    here: list[torch.nn.Module] = []

    def bring(module: torch.nn.Module) -> None:
        if module not in here:
            for each in here:
                visitors[each].leave()
            here.clear()
            visitors[module].come()
            here.append(module)

    with ExitStack() as afterwards:
        for module, visitor in visitors.items():
            afterwards.callback(visitor.end)
            # A VAE encodes and decodes by modules inside it, without being called itself.
            for called in (module, *module.children()):
                handle = called.register_forward_pre_hook(
                    _arriving(module, bring, device), prepend=True, with_kwargs=True
                )
                afterwards.callback(handle.remove)
        yield bring


def _arriving(module: torch.nn.Module, bring: Bring, device: torch.device) -> Callable[..., Any]:
    def before(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        bring(module)
        return _on(device, args, kwargs)

    return before


def _on(device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Arguments where the module computes: what was made beside weights that waited lies in RAM."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) and value.device != device else value

    return tuple(moved(each) for each in args), {name: moved(each) for name, each in kwargs.items()}


class _Visitor(Protocol):
    """A component that comes and leaves."""

    def come(self) -> None: ...

    def leave(self) -> None: ...

    def end(self) -> None:
        """Leave for good."""
        ...


class _Whole:
    """All of a component at once."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._copy: RamCopy | None = None

    def come(self) -> None:
        self._copy = to_device(self._module, self._device)

    def leave(self) -> None:
        if self._copy is not None:
            to_ram(self._module, self._device, self._copy)
            self._copy = None

    end = leave


class _Layers:
    """A component's layers one by one; while one computes, those that came next the last time are copied.

    A layer is any module with weights of its own. No more is there at once than the two largest layers take:
    while a layer between two large ones, a norm say, computes nearly nothing, the copies go on.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        layers = [each for each in module.modules() if any(True for _ in weights(each, recurse=False))]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._device = device
        # Modules that share their weights, as embeddings do, are one layer.
        found: dict[tuple[int, ...], _Layer] = {}
        self._layers = {
            each: found.setdefault(
                tuple(id(tensor) for tensor in weights(each, recurse=False)),
                _Layer(each, device, self._stream),
            )
            for each in layers
        }
        self._next: dict[torch.nn.Module | None, torch.nn.Module] = {}
        self._last: torch.nn.Module | None = None
        self._ahead: deque[torch.nn.Module] = deque()
        self._limit_bytes = sum(sorted(layer.size_bytes for layer in found.values())[-2:])
        self._handles = [
            handle
            for each in layers
            for handle in (
                each.register_forward_pre_hook(self._before, with_kwargs=True),
                each.register_forward_hook(self._after, always_call=True),
            )
        ]

    def come(self) -> None:
        """Nothing: each layer comes when it is called."""

    def leave(self) -> None:
        for layer in self._layers.values():
            layer.leave()
        self._ahead.clear()

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.leave()
        if self._stream is not None:
            self._stream.synchronize()  # what it reads may be gone after this

    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        self._next[self._last] = module
        self._last = module
        while self._ahead and self._ahead[0] is not module:  # another way than the last time
            self._layers[self._ahead.popleft()].leave()
        if self._ahead:
            self._ahead.popleft()
        self._layers[module].arrive()
        self._start_next(module)
        return _on(self._device, args, kwargs)

    def _after(self, module: torch.nn.Module, _args: Any, _output: Any) -> None:
        self._layers[module].leave()

    def _start_next(self, module: torch.nn.Module) -> None:
        there = sum(self._layers[each].size_bytes for each in (module, *self._ahead))
        last = self._ahead[-1] if self._ahead else module
        while (following := self._next.get(last)) is not None and not self._layers[following].is_here:
            there += self._layers[following].size_bytes
            if there > self._limit_bytes:
                break
            self._layers[following].start()
            self._ahead.append(following)
            last = following


class _Layer:
    """The weights of one layer, copied on ``stream`` where there is one."""

    def __init__(
        self, module: torch.nn.Module, device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self._in_ram = {tensor: tensor.data for tensor in weights(module, recurse=False)}
        self._device, self._stream = device, stream
        self._copied: torch.cuda.Event | None = None
        self.size_bytes = sum(kept.nbytes for kept in self._in_ram.values())
        self.is_here = False

    def start(self) -> None:
        """Begin to copy it to the device."""
        self.is_here = True
        if self._stream is None:
            for tensor, kept in self._in_ram.items():
                tensor.data = kept.to(self._device)
            return
        # Memory is taken from the stream that computes, which may still be using it for what it was before.
        for tensor, kept in self._in_ram.items():
            tensor.data = torch.empty_like(kept, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor, kept in self._in_ram.items():
                tensor.data.copy_(kept, non_blocking=True)
        self._copied = self._stream.record_event()

    def arrive(self) -> None:
        """Let what is computed from now on find it on the device."""
        if not self.is_here:
            self.start()
        self._wait()

    def leave(self) -> None:
        """Be in RAM."""
        if self.is_here:
            self._wait()  # its memory is given out again at once
            self.is_here = False
        for tensor, kept in self._in_ram.items():
            tensor.data = kept

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None
