"""Which engine reads which source: each made when its first job comes, and none of them loaded before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec

from studio_worker.engine.contract import Engine, KeepsModels, Preparer, Request, Resident
from studio_worker.engine.memory.peaks import Peaks
from studio_worker.errors import NotServed
from studio_worker.models import ModelSource


class Router:
    """Engines by the name a source gives (``sd-cpp``, ``onnx``, ``synthetic``), each made when first needed.

    Args:
        peaks: what they learn of the memory that pictures take.
        preparers: of those whose requests can be prepared, likewise made when first needed.
    """

    def __init__(
        self,
        factories: Mapping[str, Callable[[], Engine]],
        peaks: Peaks | None = None,
        preparers: Mapping[str, Callable[[], Preparer]] | None = None,
    ) -> None:
        self.peaks = peaks or Peaks()
        self._factories = dict(factories)
        self._engines: dict[str, Engine] = {}
        self._preparers = dict(preparers or {})
        self._prepare: dict[str, Preparer] = {}
        self._guard = threading.Lock()

    def names(self) -> frozenset[str]:
        return frozenset(self._factories)

    def for_source(self, source: ModelSource) -> Engine:
        """The engine that reads ``source``.

        Raises:
            NotServed: this worker has no such engine.
        """
        name = source.engine
        if name not in self._factories:
            known = ", ".join(sorted(self._factories))
            raise NotServed(f"unknown engine {name!r}; this worker has {known}")
        if name not in self._engines:
            self._engines[name] = self._factories[name]()
        return self._engines[name]

    def prepared(self, source: ModelSource, request: Request, check: Callable[[], None]) -> Request:
        """``request``, with all done that needs no device; from any thread. Arguments and errors as of a
        :data:`Preparer`.
        """
        name = source.engine
        if name not in self._preparers:
            return request
        with self._guard:
            if name not in self._prepare:
                self._prepare[name] = self._preparers[name]()
        return self._prepare[name](request, check)

    def made(self) -> tuple[Engine, ...]:
        """The engines that were needed so far. From any thread."""
        return tuple(self._engines.copy().values())

    def resident(self) -> dict[str, Resident]:
        """The models that are loaded, of engines that keep any. From any thread."""
        return {model: found for engine in self._keepers() for model, found in engine.resident().items()}

    def used_bytes(self) -> int | None:
        """Bytes in use on the device, by anybody; ``None`` until an engine has it. From any thread."""
        found = (keeper.used_bytes() for keeper in self._keepers())
        return next((size for size in found if size is not None), None)

    def available_bytes(self) -> int | None:
        """Bytes that the device has for a job once all models have left it; ``None`` until an engine has it.
        From any thread.
        """
        found = (keeper.available_bytes() for keeper in self._keepers())
        return next((size for size in found if size is not None), None)

    def _keepers(self) -> Iterator[KeepsModels]:
        return (engine for engine in self.made() if isinstance(engine, KeepsModels))


def default_router(device: str, *, compiles: bool = False) -> Router:
    """The engines of this package for a torch device such as ``cpu`` or ``cuda:0``; ``compiles`` as of
    :class:`DiffusionEngine`.
    """

    peaks = Peaks()

    def diffusion() -> Engine:
        from studio_worker.engine.diffusion import DiffusionEngine

        return DiffusionEngine(device, compiles=compiles, peaks=peaks)

    def synthetic() -> Engine:
        from studio_worker.engine.synthetic import SyntheticEngine

        return SyntheticEngine()

    def removal() -> Engine:
        from studio_worker.engine.removal.engine import RemovalEngine

        return RemovalEngine(device)

    factories: dict[str, Callable[[], Engine]] = {"sd-cpp": diffusion, "synthetic": synthetic}
    if find_spec("onnxruntime") is not None:
        factories["onnx"] = removal
    return Router(factories, peaks, PREPARERS)


def _diffusion_preparer() -> Preparer:
    from studio_worker.engine.families.sources import Sources
    from studio_worker.engine.preparing import preparer
    from studio_worker.engine.understood import asked

    sources = Sources()
    return preparer(lambda request, check: asked(request, sources, check))


def _removal_preparer() -> Preparer:
    from studio_worker.engine.preparing import preparer
    from studio_worker.engine.removal.engine import asked

    return preparer(asked)


PREPARERS: Mapping[str, Callable[[], Preparer]] = {"sd-cpp": _diffusion_preparer, "onnx": _removal_preparer}
"""Of the engines whose jobs bring pictures, or files that have to be read."""
