"""What a lane needs of others: of whoever has jobs, files, engines, and takes results and reports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from studio_worker.engine import Engine, Request, Resident
from studio_worker.jobs import Job, Picture
from studio_worker.models import LocalFile, ModelFile, ModelSource


class JobSource(Protocol):
    """Where a lane takes its jobs from, one at a time."""

    def take(self, rest: Callable[[], None]) -> Job | None:
        """The next job; waits for one. ``None`` ends the loop.

        Args:
            rest: called here, when no job is in hand, once at each pause and whenever somebody else needs the
                device.
        """
        ...

    def finished(self, job: Job) -> None:
        """The job is no longer in hand, whatever became of it; a next one may come."""
        ...

    def close(self) -> None:
        """No more jobs: :meth:`take` returns ``None``. From any thread."""
        ...


class Claims(Protocol):
    """Who answers to the studio for the job in hand."""

    def report_failure(self, job_id: str, error: str, *, retryable: bool) -> None:
        """The job cannot be done here."""
        ...


class Files(Protocol):
    """Where model files come from."""

    def taken(
        self,
        model: str,
        files: Iterable[ModelFile],
        *,
        progress: Callable[[int, int | None], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> AbstractContextManager[tuple[LocalFile, ...]]:
        """Every one of ``files`` on disk; they stay there until the context ends."""
        ...

    def is_as_registered(
        self, path: Path, progress: Callable[[int, int | None], None], cancel: threading.Event
    ) -> bool:
        """Whether a file that an engine could not make sense of is the one that the studio registered."""
        ...


class Engines(Protocol):
    """Which engine reads a source."""

    def for_source(self, source: ModelSource) -> Engine: ...
    def prepared(self, source: ModelSource, request: Request, check: Callable[[], None]) -> Request:
        """``request``, with all done that needs no device; from any thread."""
        ...

    def made(self) -> Iterable[Engine]: ...
    def resident(self) -> Mapping[str, Resident]: ...


class InHand(Protocol):
    """The note of the job in hand that survives a crash."""

    def begin(self, job: Job) -> None: ...
    def at_device(self) -> None:
        """What ends the process from now on may be this job's doing."""
        ...

    def end(self) -> None: ...


class Health(Protocol):
    """Who judges from the ends of jobs whether more should come."""

    def made(self, job: Job) -> None: ...
    def failed(self, job: Job, error: Exception) -> None:
        """It could not be done here; whose fault that is, ``error`` says. Not for jobs handed back."""
        ...


class Results(Protocol):
    """Where finished pictures go."""

    def add(self, job: Job, picture: Picture, timings_s: Mapping[str, float]) -> None: ...
    def wake(self) -> None: ...


class WorkReports(Protocol):
    """Who is told what becomes of jobs."""

    def job_began(self, job_id: str, model: str) -> None: ...
    def job_prepares(self) -> None: ...
    def job_waits(self) -> None: ...
    def job_loads(self) -> None: ...
    def job_stepped(self, step: int, steps: int) -> None: ...
    def job_made(self) -> None: ...
    def job_failed(
        self, job_id: str, model: str, reason: str, *, retryable: bool, handed_back: bool
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ports:
    """All that a lane works with.

    Args:
        fetch: gets an input picture's bytes, given up when the event is set; raises DownloadError.
    """

    source: JobSource
    claims: Claims
    files: Files
    engines: Engines
    in_hand: InHand
    results: Results
    reports: WorkReports
    health: Health
    fetch: Callable[[str, threading.Event], bytes]
