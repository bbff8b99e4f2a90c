"""The desk where a session's thread puts an accepted job and a lane's takes it; and all lanes' desks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from studio_worker.context import called
from studio_worker.jobs import Job


class Hands:
    """Whose job is in hand where, so that no job is in hand twice. Safe from any thread."""

    def __init__(self) -> None:
        self._holders: dict[str, Desk] = {}
        self._guard = threading.Lock()

    def take(self, job_id: str, desk: Desk) -> bool:
        """Whether ``desk`` has it now: not where another one has."""
        with self._guard:
            return self._holders.setdefault(job_id, desk) is desk

    def let_go(self, job_id: str) -> None:
        with self._guard:
            self._holders.pop(job_id, None)

    def has_another(self, job_id: str, desk: Desk) -> bool:
        """Whether another desk than ``desk`` has it."""
        return self._holders.get(job_id, desk) is not desk


class Desk:
    """Where a session puts an accepted job and its lane takes it: room for one.

    Safe from any thread; also from a signal handler, since :class:`queue.SimpleQueue` is reentrant.

    Args:
        hands: what is in hand at all desks of this box.
    """

    def __init__(self, hands: Hands | None = None) -> None:
        self._hands = hands or Hands()
        self._jobs: queue.SimpleQueue[Job | threading.Event | None] = queue.SimpleQueue()
        self._current: Job | None = None
        self._paused = self._closed = False
        self._closing = threading.Lock()
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

    def put(self, job: Job) -> bool:
        """Whether it is here now: not where it is in hand at another desk."""
        if not self._hands.take(job.job_id, self):
            return False
        self._current = job
        self._jobs.put(job)
        return True

    def is_elsewhere(self, job_id: str) -> bool:
        """Whether this job is in hand at another desk."""
        return self._hands.has_another(job_id, self)

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
        """Let whoever takes jobs rest, after the job in hand; the event is set when that is done, and where
        nobody takes jobs here any more.
        """
        rested = threading.Event()
        with self._closing:
            if self._closed:
                rested.set()
            else:
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

    def finished(self, job: Job) -> None:
        """The job in hand has ended, whatever became of it; a next one may come."""
        self._current = None
        self._hands.let_go(job.job_id)

    def close(self) -> None:
        """No more jobs: offers are refused as ``paused`` and :meth:`take` returns ``None``."""
        with self._closing:
            self._closed = True
            self._jobs.put(None)


class Desks:
    """The desks of all lanes, for what concerns the box and not a lane. Safe from any thread."""

    def __init__(self, desks: Sequence[Desk]) -> None:
        self._desks = tuple(desks)

    @property
    def current_job_ids(self) -> list[str]:
        """The jobs in hand, by lane."""
        return [job_id for desk in self._desks if (job_id := desk.current_job_id) is not None]

    @property
    def is_paused(self) -> bool:
        """Whether no lane takes jobs."""
        return all(desk.is_paused for desk in self._desks)

    def about_job(self) -> AbstractContextManager[None]:
        """As :meth:`Desk.about_job`, of the first lane that has one."""
        return next((desk for desk in self._desks if not desk.is_idle()), self._desks[0]).about_job()

    def is_idle(self) -> bool:
        """Whether no job is in hand."""
        return all(desk.is_idle() for desk in self._desks)

    def rest(self) -> list[threading.Event]:
        """As :meth:`Desk.rest`, of each."""
        return [desk.rest() for desk in self._desks]

    def pause(self) -> None:
        for desk in self._desks:
            desk.pause()

    def resume(self) -> None:
        for desk in self._desks:
            desk.resume()

    def close(self) -> None:
        for desk in self._desks:
            desk.close()
