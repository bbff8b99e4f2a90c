"""Jobs and their results on disk: each step of :mod:`rules`, each turn of :mod:`turns` is one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from typing import IO, Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from studio_worker.local_studio import line, rules
from studio_worker.local_studio.job_rows import (
    ALL,
    FREE,
    HELD,
    HELD_BY,
    LOCKED,
    ONE,
    add,
    find,
    job_of,
    remove,
    require,
    save,
)
from studio_worker.local_studio.leases import Loss
from studio_worker.local_studio.line import Ready
from studio_worker.local_studio.lookout import Lookout
from studio_worker.local_studio.pictures import Pictures, StorageAway, StoredBytes
from studio_worker.local_studio.rules import JobStatus, QueuedJob, Rejection
from studio_worker.local_studio.storage import locks
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.tables import jobs, results
from studio_worker.local_studio.turns import PATIENCE, Patience

_KEY = select(results.c.key).where(results.c.job_id == bindparam("wanted"))

_TRIES = 3
"""How many jobs that somebody is changing at this moment are looked at for one offer."""


@dataclass(frozen=True)
class Result:
    """What a job brought. ``seconds`` runs from the worker's accept to the delivery."""

    job_id: str
    ext: str
    prompt: str
    generation_meta: Any
    worker_id: str
    seconds: float
    created_at: float
    size_bytes: int


OnStep = Callable[[QueuedJob | None, QueuedJob], None]
"""Told of each step after its commit: the job before, ``None`` for a new one, and the job as it is now."""


def _nobody(_connection: Connection) -> Collection[str]:
    return ()


class JobQueue:
    """The queue, and what came out of it."""

    def __init__(
        self,
        database: Database,
        pictures: Pictures,
        clock: Callable[[], float] = time.time,
        patience: Patience = PATIENCE,
        on_step: OnStep = lambda _before, _after: None,
    ) -> None:
        self._database = database
        self._pictures = pictures
        self._clock = clock
        self._on_step = on_step
        self._patience = patience
        self.lookout = Lookout(database, clock, patience)

    def add(self, job: QueuedJob) -> bool:
        """Put a new job at the end of the queue; whether it is new. Raises RuleBroken for another's id."""
        with self._database.writing() as connection:
            is_new = add(connection, job)
        if is_new:
            self._on_step(None, job)
        return is_new

    def get(self, job_id: str) -> QueuedJob | None:
        """One job, or ``None`` where the id is unknown."""
        with self._database.reading() as connection:
            return find(connection, ONE, job_id)

    def listed(self, status: JobStatus | None = None, limit: int = 100, offset: int = 0) -> list[QueuedJob]:
        """Jobs, the queued ones in the order they will be offered, all others newest first."""
        page = ALL.limit(limit).offset(offset)
        with self._database.reading() as connection:
            if status is JobStatus.QUEUED:
                return line.in_turn(connection, limit, offset)
            if status is None:
                page = page.order_by(jobs.c.seq.desc())
            else:
                page = page.where(jobs.c.status == status)
                page = page.order_by(jobs.c.finished_at.desc(), jobs.c.seq.desc())
            return [job_of(row) for row in connection.execute(page).mappings()]

    def counts(self) -> dict[str, int]:
        """How many jobs stand where; every status is named."""
        with self._database.reading() as connection:
            rows = connection.execute(select(jobs.c.status, func.count("*")).group_by(jobs.c.status))
            return {status.value: 0 for status in JobStatus} | {row[0]: row[1] for row in rows}

    def held_by(self, worker_id: str) -> QueuedJob | None:
        """The job this worker has been offered or is running."""
        with self._database.reading() as connection:
            return find(connection, HELD_BY, worker_id)

    def held(self) -> dict[str | None, QueuedJob]:
        """All such jobs, by worker."""
        with self._database.reading() as connection:
            found = map(job_of, connection.execute(HELD).mappings())
            return {job.worker_id: job for job in found}

    def take_next(self, worker_id: str, ready: Ready = _nobody, *, session_no: int = 0) -> QueuedJob | None:
        """Offer this worker the job whose turn it is, if there is one and it holds none.

        Args:
            ready: who could take a job now, asked within the step.
            session_no: which session of the worker is to hold it.
        """
        with self._database.writing() as connection:
            with self.lookout.resting_after_failure():
                locks.take_turns(connection)
            now = self._clock()
            lines = line.Lines(connection, worker_id, lambda: line.crew_now(connection, ready))
            for _ in range(_TRIES):
                job_id = lines.choose(now, self._patience)
                if job_id is None:
                    return None
                chosen = find(connection, FREE, job_id, for_whom=worker_id)
                if chosen is not None:
                    break
                # Its turn is not lost because, say, a picture of it comes too late and is turned away.
                if not locks.settled(connection, LOCKED, {"wanted": job_id}):
                    lines.leave_out(job_id)
            else:
                return None
            job = save(connection, chosen, rules.offered(chosen, worker_id, now, session_no))
            lines.take_turn(job)
        self._on_step(chosen, job)
        return job

    def accept(self, job_id: str, worker_id: str) -> QueuedJob:
        """Raises RuleBroken where the worker does not hold the job."""
        return self._change(job_id, lambda job: rules.accepted(job, worker_id, self._clock()))

    def decline(self, job_id: str, worker_id: str) -> QueuedJob:
        """It is busy or paused. Raises RuleBroken where the worker does not hold the job."""
        return self._change(job_id, lambda job: rules.declined(job, worker_id))

    def reject(
        self, job_id: str, worker_id: str, reason: str, *, name: str = "", connected: Collection[str] = ()
    ) -> QueuedJob:
        """It will not do the job. Raises RuleBroken where the worker does not hold it.

        Args:
            name: what people call this worker.
            connected: the workers that could be asked besides.
        """
        rejection = Rejection(reason, name or worker_id[:8], self._clock())
        return self._change(job_id, lambda job: rules.rejected(job, worker_id, rejection, connected))

    def fail(self, job_id: str, worker_id: str, error: str, *, retryable: bool) -> QueuedJob:
        """Raises RuleBroken where the worker does not hold the job."""
        return self._change(
            job_id, lambda job: rules.failed(job, worker_id, error, self._clock(), retryable=retryable)
        )

    def let_go(self, job_id: str, judge: Callable[[Connection, QueuedJob], Loss | None]) -> QueuedJob | None:
        """Release a job that is held and lost: once, whoever else sees it.

        Args:
            judge: whether it is lost; asked within the transaction that has the job.
        """
        with self._database.writing() as connection:
            before = find(connection, LOCKED, job_id)
            loss = judge(connection, before) if before is not None and before.status in rules.HELD else None
            if before is None or loss is None:
                return None
            free = rules.released(before, loss.reason, self._clock(), counts=loss.counts)
            after = save(connection, before, free)
        self._on_step(before, after)
        return after

    def deliver(
        self,
        job_id: str,
        worker_id: str,
        content: IO[bytes],
        *,
        ext: str,
        prompt: str | None,
        meta: Any = None,
    ) -> Result:
        """Keep a result and mark its job done, once. Raises RuleBroken where it comes too late, CannotStore.

        Args:
            content: the bytes, as they are served later.
            prompt: the prompt as delivered; where it is missing, the task's own is kept.
            meta: the worker's ``generationMeta``, any JSON.
        """
        with self._database.reading() as connection:  # nothing is written for a late one
            rules.delivered(require(connection, job_id, ONE), worker_id, self._clock())
        stored = self._pictures.put(content, job_id, ext)
        try:
            return self._record(job_id, worker_id, stored, ext, prompt, meta)
        except StorageAway:
            raise  # it may have been committed all the same; bytes that no row names are swept one day
        except BaseException:
            self._pictures.delete(stored.key)
            raise

    def _record(
        self, job_id: str, worker_id: str, stored: StoredBytes, ext: str, prompt: str | None, meta: Any
    ) -> Result:
        now = self._clock()
        with self._database.writing() as connection:
            before = require(connection, job_id)
            job = save(connection, before, rules.delivered(before, worker_id, now))
            began = before.started_at or before.offered_at or now
            result = Result(
                job_id=job_id,
                ext=ext,
                prompt=prompt if prompt is not None else str(job.task.get("prompt", "")),
                generation_meta=meta,
                worker_id=worker_id,
                seconds=round(max(0.0, now - began), 3),
                created_at=now,
                size_bytes=stored.size_bytes,
            )
            connection.execute(insert(results), asdict(result) | {"key": stored.key})
            line.made(connection, worker_id, job.model)
        self._on_step(before, job)
        return result

    def count_refused_upload(self, job_id: str) -> None:
        """Note that a delivery of this job was turned away."""
        self._change(job_id, lambda job: replace(job, refused_uploads=job.refused_uploads + 1))

    def retry(self, job_id: str) -> QueuedJob:
        """Queue a failed or rejected job again. Raises RuleBroken for any other."""
        return self._change(job_id, rules.retried)

    def delete(self, job_id: str) -> None:
        """Remove a job and what it brought. Raises RuleBroken for one that a worker holds."""
        with self._database.writing() as connection:
            job = require(connection, job_id)
            if job.status in rules.HELD:
                raise rules.RuleBroken(f"job {job_id} is {job.status}; it can be deleted when that is over")
            key = _key(connection, job_id)
            connection.execute(delete(results).where(results.c.job_id == job_id))
            remove(connection, job)
        if key is not None:
            self._pictures.delete(key)

    def result(self, job_id: str) -> Result | None:
        """What is known of a job's result, without its bytes."""
        return self.results([job_id]).get(job_id)

    def results(self, job_ids: Collection[str]) -> dict[str, Result]:
        """The same of many, by job; those without a result are left out."""
        columns = (results.c[field.name] for field in fields(Result))
        with self._database.reading() as connection:
            found = connection.execute(select(*columns).where(results.c.job_id.in_(job_ids))).mappings()
            return {row["job_id"]: Result(**row) for row in found}

    def picture(self, job_id: str) -> str | None:
        """The key of a job's result."""
        with self._database.reading() as connection:
            return _key(connection, job_id)

    def _change(self, job_id: str, rule: Callable[[QueuedJob], QueuedJob]) -> QueuedJob:
        with self._database.writing() as connection:
            before = require(connection, job_id)
            after = save(connection, before, rule(before))
        self._on_step(before, after)
        return after


def _key(connection: Connection, job_id: str) -> str | None:
    return connection.execute(_KEY, {"wanted": job_id}).scalar()
