"""What the studio does not keep for ever: old jobs and pictures, inputs that no job names, old log lines.

Nothing goes unless the operator says how long, or how much, is kept; and nothing that waits or is being made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import CompoundSelect, Row, Select, select, type_coerce, union

from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import CannotStore, Pictures
from studio_worker.local_studio.rules import JobStatus, RuleBroken
from studio_worker.local_studio.shelf import FILE_PATH, Shelf
from studio_worker.local_studio.storage.columns import Words
from studio_worker.local_studio.storage.database import SERVER_TIME, Database
from studio_worker.local_studio.storage.locks import look_at_all
from studio_worker.local_studio.storage.tables import files, jobs, results

logger = logging.getLogger(__name__)

EVERY_S = 3600.0
DAY_S = 86_400.0
INPUT_S = DAY_S
"""So long an input picture may wait for the job that names it."""

_TASK_TEXT = type_coerce(jobs.c.task, Words).label("task")
_WITH_INPUTS = select(jobs.c.seq, _TASK_TEXT).where(_TASK_TEXT.like("%/files/%")).order_by(jobs.c.seq)
_ROWS = 500
"""Prompts that are in memory at a time."""


@dataclass(frozen=True)
class Retention:
    """How long finished and failed jobs are kept, and how many bytes of results; ``None`` sets no limit."""

    keep_s: float | None = None
    keep_bytes: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether anything goes at all."""
        return self.keep_s is not None or self.keep_bytes is not None


FOR_EVER = Retention()


class Housekeeping:
    """Tidies up at the start and once an hour, on a thread of its own."""

    def __init__(
        self,
        database: Database,
        queue: JobQueue,
        shelf: Shelf,
        pictures: Pictures,
        retention: Retention,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._queue = queue
        self._shelf = shelf
        self._pictures = pictures
        self._retention = retention
        self._clock = clock
        # Where others deliver at the same time, what no row names yet is looked at once it is old.
        self._is_shared = pictures.is_shared or database.is_shared
        self._swept_at = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, where anything is to be done at all."""
        if self._retention.is_limited or self._is_shared:
            self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End; the database may be closed afterwards."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def keep_house(self) -> None:
        """What is due now. Raises CannotStore."""
        if self._retention.is_limited:
            self.tidy()
        if self._is_shared and (now := self._now()) - self._swept_at >= DAY_S:
            self._swept_at = now
            self.sweep(0.0, now - DAY_S)

    def tidy(self) -> None:
        """Let go of what is beyond the limits. Raises CannotStore."""
        jobs = sum(self._forget(job_id) for job_id in [*self._too_old(), *self._too_many()])
        inputs = sum(self._shelf.delete_picture(file_id) for file_id in self._unnamed_inputs())
        if self._retention.keep_s is not None:
            before = datetime.fromtimestamp(self._now() - self._retention.keep_s, UTC)
            self._shelf.delete_logs(before.isoformat(timespec="seconds"))
        if jobs or inputs:
            logger.info("tidied up", extra={"jobs": jobs, "inputs": inputs})

    def sweep(self, since: float, until: float = float("inf")) -> None:
        """Remove pictures that crashes left without a row, of between two times: no delivery of then may be
        under way. Raises CannotStore.
        """
        every = union(select(results.c.key), select(files.c.key))
        removed = self._pictures.remove_unnamed({row.key for row in self._rows(every)}, since, until)
        if removed:
            logger.info("pictures without a row removed", extra={"pictures": removed})

    def _run(self) -> None:
        while True:
            try:
                self.keep_house()
            except CannotStore as error:
                logger.error("cannot tidy up", extra={"error": str(error)})
            except Exception:  # a fault in here must not end the studio, nor go unseen
                logger.exception("cannot tidy up")
            if self._stopping.wait(EVERY_S):
                return

    def _forget(self, job_id: str) -> bool:
        if self._stopping.is_set():
            return False
        try:
            self._queue.delete(job_id)
        except RuleBroken:  # somebody has removed it, or wants it again
            return False
        return True

    def _too_old(self) -> Iterator[str]:
        if self._retention.keep_s is None:
            return
        before = self._now() - self._retention.keep_s
        ended = jobs.c.status.in_((JobStatus.DONE, JobStatus.FAILED))
        for row in self._rows(select(jobs.c.job_id).where(ended, jobs.c.finished_at < before)):
            yield row.job_id

    def _too_many(self) -> Iterator[str]:
        if self._retention.keep_bytes is None:
            return
        total = 0
        newest = select(results.c.job_id, results.c.size_bytes).order_by(results.c.created_at.desc())
        for row in self._rows(newest):
            total += row.size_bytes
            if total > self._retention.keep_bytes:
                yield row.job_id

    def _unnamed_inputs(self) -> list[str]:
        before = self._now() - INPUT_S
        old = self._rows(select(files.c.file_id).where(files.c.created_at < before))
        if not old:
            return []
        named: set[str] = set()
        last = 0
        while some := self._rows(_WITH_INPUTS.where(jobs.c.seq > last).limit(_ROWS)):
            last = some[-1].seq
            for row in some:
                named.update(FILE_PATH.findall(row.task))
        return [row.file_id for row in old if row.file_id not in named]

    def _now(self) -> float:
        """The database's time where it has its own: one machine's wrong clock removes nothing early."""
        if not self._database.is_shared:
            return self._clock()
        with self._database.reading() as connection:
            return float(connection.execute(SERVER_TIME).scalar_one())

    def _rows(self, query: Select[Any] | CompoundSelect[Any]) -> Sequence[Row[Any]]:
        with self._database.reading() as connection:
            look_at_all(connection)
            return connection.execute(query).all()
