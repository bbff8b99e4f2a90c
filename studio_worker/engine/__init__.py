"""The engines: from one image task and its model's files to one encoded picture.

This module owns what the worker needs to know of an engine and which engine reads which source. It
imports no torch: an engine's own module does that when its first job comes, so that a configuration
error, ``status`` and the way to READY never pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, Protocol, runtime_checkable

from studio_worker.engine.peaks import Peaks
from studio_worker.errors import NotServed
from studio_worker.jobs import Cancel, ImageTask, Picture
from studio_worker.models import CliDefaults, LocalFile, ModelSource

Progress = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all), and with (0, steps in all) as a sign of
life whenever something else is done: a tensor read, a layer of a text encoder or of the VAE passed. Between
two calls lies no more than one of these, so that a slow disk or machine does not look like a hung device."""


@dataclass(frozen=True)
class Inputs:
    """The encoded input pictures of a task, as fetched; format unknown, not yet trusted."""

    init_image: bytes | None = None
    mask: bytes | None = None
    ref_image: bytes | None = None


@dataclass(frozen=True)
class Request:
    """Everything an engine needs for one picture."""

    job_id: str
    model: str
    task: ImageTask
    defaults: CliDefaults
    files: tuple[LocalFile, ...]
    inputs: Inputs = Inputs()


class Engine(Protocol):
    """Makes pictures. Called from one thread only."""

    def generate(self, request: Request, progress: Progress, cancel: Cancel) -> Picture:
        """Make one picture.

        Raises:
            JobError: the request cannot be met; says whether another try may help.
            JobCancelled: ``cancel`` was set; the engine stays usable.
            DeviceError: the device is lost; the process should end.
        """
        ...


class Resident(NamedTuple):
    """A model that is loaded: its weights' bytes, where they are (``device``, ``ram`` or ``device and ram``),
    and whether quantised ones are written out, since there is room.
    """

    size_bytes: int
    place: str
    is_unpacked: bool = False


@runtime_checkable
class KeepsModels(Protocol):
    """What an engine that keeps models in memory tells of it, from any thread."""

    def resident(self) -> Mapping[str, Resident]:
        """The models that are wholly loaded, by name."""
        ...

    def used_bytes(self) -> int | None:
        """Bytes in use on the device, by this process and others; ``None`` where it does not say."""
        ...

    def available_bytes(self) -> int | None:
        """Bytes that the device has for a job once all models have left it: what other processes use, and a
        reserve, is not among them; ``None`` where it does not say.
        """
        ...

    def preload(
        self, model: str, files: Sequence[LocalFile], defaults: CliDefaults, go_on: Callable[[], bool]
    ) -> bool:
        """Load a model before its first job, unless others would have to leave for it; called from the
        engine's own thread.

        Args:
            go_on: asked before each component; the rest stays where it is when it says no. Called after each
                tensor too, as a sign of life.

        Returns whether the model is wholly loaded.

        Raises:
            JobError: the model cannot be loaded.
            DeviceError: the device is lost; the process should end.
        """
        ...

    def release(self) -> None:
        """Let all models leave the device, for RAM where there is room; from the engine's own thread.

        Raises:
            DeviceError: the device is lost; the process should end.
        """
        ...


class Router:
    """Engines by the name a source gives (``sd-cpp``, ``onnx``, ``synthetic``), each made when first needed.

    Args:
        peaks: what they learn of the memory that pictures take.
    """

    def __init__(self, factories: Mapping[str, Callable[[], Engine]], peaks: Peaks | None = None) -> None:
        self.peaks = peaks or Peaks()
        self._factories = dict(factories)
        self._engines: dict[str, Engine] = {}

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
        from studio_worker.engine.removal import RemovalEngine

        return RemovalEngine(device)

    factories: dict[str, Callable[[], Engine]] = {"sd-cpp": diffusion, "synthetic": synthetic}
    if find_spec("onnxruntime") is not None:
        factories["onnx"] = removal
    return Router(factories, peaks)
