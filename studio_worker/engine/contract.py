"""What an engine is to whoever uses it: what it is asked, what it answers, what it tells of its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from studio_worker.jobs import Cancel, ImageTask, Picture
from studio_worker.models import CliDefaults, LocalFile

StepProgress = Callable[[int, int], None]
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
    prepared: object = None
    """What a :data:`Preparer` has made of all this; the inputs are in it, and here no more."""


Preparer = Callable[[Request, Callable[[], None]], Request]
"""Does of a request what needs no device: checks it, decodes its inputs and lays them out. From any thread.
What nobody has prepared the engine prepares itself.

The second argument is called meanwhile; what it raises ends that. Raises JobError as :meth:`Engine.make`."""


class Made(Protocol):
    """A picture as it leaves the device: its pixels in RAM."""

    def encoded(self) -> Picture:
        """The picture in its file format, with what made it. Uses no device; from any thread, once.

        Raises:
            JobError: it cannot be written so; says whether another try may help.
        """
        ...


class Engine(Protocol):
    """Makes pictures. Called from one thread only, and one call after the other."""

    def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
        """Make one picture's pixels: all of it that needs the device.

        Raises:
            JobError: the request cannot be met; says whether another try may help.
            JobCancelled: ``cancel`` was set; the engine stays usable.
            DeviceError: the device is lost; the process should end.
        """
        ...

    def generate(self, request: Request, progress: StepProgress, cancel: Cancel) -> Picture:
        """Make one picture and encode it here. Raises as :meth:`make` and :meth:`Made.encoded`."""
        return self.make(request, progress, cancel).encoded()


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
        """Bytes that the device has for a job once all models have left it, and the picture in hand is made:
        what other processes use, and a reserve, is not among them; ``None`` where it does not say.
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
