"""The desk where the session's thread puts an accepted job and the worker's thread takes it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from studio_worker.context import called
from studio_worker.jobs import Job


class Desk:
    """Where the session puts an accepted job and the worker takes it: room for one.

    Safe from any thread; also from a signal handler, since :class:`queue.SimpleQueue` is reentrant.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | threading.Event | None] = queue.SimpleQueue()
        self._current: Job | None = None
        self._paused = self._closed = False
        self._pause: threading.Event | None = None

    @property
    def is_paused(self) -> bool:
        """Whether offers are refused as ``paused``: by the operator's wish, or because the desk is closed."""
        return self._paused or self._closed

    @property
    def current_job_id(self) -> str | None:
        """The job accepted and not yet finished."""
        job = self._current
        return None if job is None else job.job_id

    def about_job(self) -> AbstractContextManager[None]:
        """While this lasts, what is logged is about the job that is in hand now, if there is one."""
        job = self._current
        return called() if job is None else called(job_id=job.job_id, model=job.model)

    def is_idle(self) -> bool:
        """Whether no job is in hand."""
        return self._current is None

    def put(self, job: Job) -> None:
        self._current = job
        self._jobs.put(job)

    def take(self, rest: Callable[[], None]) -> Job | None:
        """The next job; waits for one. ``None`` = there will be no more.

        Args:
            rest: called for each :meth:`rest`, at a pause as long as it lasts.
        """
        while isinstance(found := self._jobs.get(), threading.Event):
            if found is not self._pause or self._paused:
                rest()
            found.set()
        return found

    def rest(self) -> threading.Event:
        """Let whoever takes jobs rest, after the job in hand; the event is set when that is done."""
        rested = threading.Event()
        self._jobs.put(rested)
        return rested

    def pause(self) -> None:
        """No offer is taken until :meth:`resume`; the job in hand goes on."""
        if not self._paused:
            self._paused = True
            self._pause = self.rest()

    def resume(self) -> None:
        """Offers are taken again, unless the desk is closed."""
        self._paused = False

    def finished(self, job: Job) -> None:  # noqa: ARG002  (there is room for one)
        """The job in hand has ended, whatever became of it; a next one may come."""
        self._current = None

    def close(self) -> None:
        """No more jobs: offers are refused as ``paused`` and :meth:`take` returns ``None``."""
        self._closed = True
        self._jobs.put(None)
