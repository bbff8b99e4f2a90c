"""Models in memory that no job asks for just now: loaded before their first one, released at a pause."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from studio_worker.context import called
from studio_worker.engine import KeepsModels
from studio_worker.errors import DownloadError, JobError, StudioWorkerError
from studio_worker.models import RequiredModel
from studio_worker.work.ports import Engines, Files
from studio_worker.work.stride import Stride

log = logging.getLogger(__name__)


class Preloader:
    """Has engines load models before their first job.

    Args:
        cancel: ends the wait for a model's files.
    """

    def __init__(self, engines: Engines, files: Files, stride: Stride, cancel: threading.Event) -> None:
        self._engines = engines
        self._files = files
        self._stride = stride
        self._cancel = cancel

    def preload(
        self, models: Iterable[RequiredModel], go_on: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        """Load ``models``, as many as fit together.

        Args:
            go_on: whether nothing more urgent waits; asked between components.
            say: gets what is being loaded, and an empty string at the end.

        Raises:
            DeviceError: the device is lost; the process should end.
        """
        for model in models:
            if not go_on():
                break
            say(f"loading {model.id}")
            self._stride.moved()
            with called(model=model.id):
                try:
                    self._load(model, go_on)
                except (JobError, DownloadError) as error:
                    log.warning("model not preloaded", extra={"op": "preload", "error": str(error)})
                finally:
                    self._stride.end()
                    say("")

    def _load(self, model: RequiredModel, go_on: Callable[[], bool]) -> None:
        began = time.monotonic()
        engine = self._engines.for_source(model)
        if not isinstance(engine, KeepsModels):
            return

        def goes_on() -> bool:
            self._stride.moved()
            return go_on()

        with self._files.taken(model.id, model.files, cancel=self._cancel) as files:
            is_whole = engine.preload(model.id, files, model.cli_defaults, goes_on)
        elapsed_ms = round((time.monotonic() - began) * 1000)
        message = "model preloaded" if is_whole else "model not preloaded"
        log.info(message, extra={"op": "preload", "elapsed_ms": elapsed_ms})


def release_all(engines: Engines) -> None:
    """Have engines let go of the device: who pauses the box wants its memory for something else."""
    for engine in engines.made():
        if isinstance(engine, KeepsModels):
            try:
                engine.release()
            # No room in RAM, or a device that is lost: the next job finds it. A pause ends no service.
            except Exception as error:
                reason = str(error) if isinstance(error, StudioWorkerError) else type(error).__name__
                log.warning("models stay on the device", extra={"op": "pause", "error": reason})
