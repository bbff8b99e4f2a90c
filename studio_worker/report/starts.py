"""How often the service was started, and how often it did not come to an end: a small file that survives."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ValidationError

from studio_worker.errors import StudioWorkerError
from studio_worker.files import remove_temporaries, write_atomic

log = logging.getLogger(__name__)


class _Note(BaseModel):
    starts: int = 0
    crashes: int = 0
    last_crash_at: float | None = None
    is_running: bool = False


class Starts:
    """A context manager around one run of the service.

    It counts the start, and the process before as a crash where that left no note of its end: killed, out of
    memory, power cut, a fault of ours.

    Args:
        folder: the state folder, locked for this process.
        clock: Unix seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = folder / "starts.json"
        self._clock = clock
        self._note = _Note()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What is noted in ``folder``; counts nothing."""
        starts = cls(folder)
        starts._note = starts._read()
        return starts

    @property
    def count(self) -> int:
        """Starts, this one included."""
        return self._note.starts

    @property
    def crashes(self) -> int:
        return self._note.crashes

    @property
    def last_crash_at(self) -> float | None:
        """When the last crash was noticed, by the start after it; Unix seconds."""
        return self._note.last_crash_at

    def __enter__(self) -> Self:
        remove_temporaries(self._path.parent)
        self._note = self._read()
        self._note.starts += 1
        if self._note.is_running:
            self._note.crashes += 1
            self._note.last_crash_at = self._clock()
        self._write(is_running=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, StudioWorkerError):
            self._write(is_running=False)

    def _read(self) -> _Note:
        try:
            return _Note.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _Note()
        except (OSError, ValidationError):
            log.warning("count of starts is unreadable and begins anew", extra={"path": str(self._path)})
            return _Note()

    def _write(self, *, is_running: bool) -> None:
        self._note.is_running = is_running
        try:
            write_atomic(self._path, self._note.model_dump_json().encode())
        except OSError as error:  # a full disk: the pictures that wait matter, this count does not
            log.warning("starts cannot be counted", extra={"path": str(self._path), "error": error.strerror})
