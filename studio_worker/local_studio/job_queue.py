"""Jobs and their results on disk: each step of :mod:`rules`, each turn of :mod:`turns` is one transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from typing import IO, Any

from studio_worker.local_studio import rules
from studio_worker.local_studio.database import Database, Row
from studio_worker.local_studio.line import Line, rejections_of
from studio_worker.local_studio.pictures import Pictures, StoredBytes
from studio_worker.local_studio.rules import JobStatus, QueuedJob, Rejection
from studio_worker.local_studio.turns import PATIENCE, Patience

_JSON = ("task", "model_source", "rejections")
_COLUMNS = tuple(field.name for field in fields(QueuedJob))
_HELD_SQL = "status IN ('offered', 'running')"


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


class JobQueue:
    """The queue, and what came out of it."""

    def __init__(
        self,
        database: Database,
        pictures: Pictures,
        clock: Callable[[], float] = time.time,
        patience: Patience = PATIENCE,
    ) -> None:
        self._database = database
        self._pictures = pictures
        self._clock = clock
        self._line = Line(database, patience)

    def add(self, job: QueuedJob) -> None:
        """Put a new job at the end of the queue."""
        with self._database.writing() as connection:
            connection.execute(
                f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})",
                _values(job),
            )

    def get(self, job_id: str) -> QueuedJob | None:
        """One job, or ``None`` where the id is unknown."""
        row = self._database.row("SELECT * FROM jobs WHERE job_id = ?", (job_id,))
        return None if row is None else _job(row)

    def listed(self, status: JobStatus | None = None, limit: int = 100, offset: int = 0) -> list[QueuedJob]:
        """Jobs, the queued ones in the order they will be offered, all others newest first."""
        if status is None:
            rows = self._database.rows(
                "SELECT * FROM jobs ORDER BY seq DESC LIMIT ? OFFSET ?", (limit, offset)
            )
        elif status is JobStatus.QUEUED:
            numbers = self._line.in_turn(limit, offset)
            found = [self._database.row("SELECT * FROM jobs WHERE seq = ?", (number,)) for number in numbers]
            rows = [row for row in found if row is not None]
        else:
            rows = self._database.rows(
                "SELECT * FROM jobs WHERE status = ? ORDER BY finished_at DESC, seq DESC LIMIT ? OFFSET ?",
                (status, limit, offset),
            )
        return [_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many jobs stand where; every status is named."""
        rows = self._database.rows("SELECT status, count(*) AS n FROM jobs GROUP BY status")
        return {status.value: 0 for status in JobStatus} | {row["status"]: row["n"] for row in rows}

    def held_by(self, worker_id: str) -> QueuedJob | None:
        """The job this worker has been offered or is running."""
        row = self._database.row(f"SELECT * FROM jobs WHERE worker_id = ? AND {_HELD_SQL}", (worker_id,))
        return None if row is None else _job(row)

    def take_next(self, worker_id: str, ready: Collection[str] = ()) -> QueuedJob | None:
        """Offer this worker the job whose turn it is, if there is one and it holds none.

        Args:
            ready: who else could take a job now.
        """
        if self._database.row("SELECT 1 FROM jobs WHERE status = 'queued' LIMIT 1") is None:
            return None  # the usual case at every idle heartbeat: write nothing, wake nobody
        with self._database.writing() as connection:
            if self.held_by(worker_id) is not None:
                return None
            now = self._clock()
            job_id = self._line.choose(worker_id, ready, now)
            if job_id is None:
                return None
            job = _save(connection, rules.offered(self._require(job_id), worker_id, now))
            self._line.take_turn(job)
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

    def release(self, worker_id: str, reason: str, *, counts: bool = True) -> QueuedJob | None:
        """Let go of what this worker holds, because its session is gone."""
        held = self.held_by(worker_id)
        if held is None:
            return None
        return self._change(
            held.job_id, lambda job: rules.released(job, reason, self._clock(), counts=counts)
        )

    def release_all(self, reason: str) -> int:
        """Let go of every claim without counting an attempt: the studio itself was away."""
        rows = self._database.rows(f"SELECT DISTINCT worker_id FROM jobs WHERE {_HELD_SQL}")
        for row in rows:
            self.release(row["worker_id"], reason, counts=False)
        return len(rows)

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
        """Keep a result and mark its job done, once. Raises RuleBroken where it comes too late, StorageFull.

        Args:
            content: the bytes, as they are served later.
            prompt: the prompt as delivered; where it is missing, the task's own is kept.
            meta: the worker's ``generationMeta``, any JSON.
        """
        rules.delivered(self._require(job_id), worker_id, self._clock())  # nothing is written for a late one
        stored = self._pictures.put(content, job_id, ext)
        try:
            return self._record(job_id, worker_id, stored, ext, prompt, meta)
        except BaseException:
            self._pictures.delete(stored.key)
            raise

    def _record(
        self, job_id: str, worker_id: str, stored: StoredBytes, ext: str, prompt: str | None, meta: Any
    ) -> Result:
        now = self._clock()
        with self._database.writing() as connection:
            before = self._require(job_id)
            job = _save(connection, rules.delivered(before, worker_id, now))
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
            connection.execute(
                "INSERT INTO results (job_id, ext, prompt, generation_meta, worker_id, seconds, created_at,"
                " size_bytes, key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job_id,
                    ext,
                    result.prompt,
                    None if meta is None else json.dumps(meta),
                    worker_id,
                    result.seconds,
                    now,
                    result.size_bytes,
                    stored.key,
                ),
            )
            self._line.made(worker_id, job.model)
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
            job = self._require(job_id)
            if job.status in rules.HELD:
                raise rules.RuleBroken(f"job {job_id} is {job.status}; it can be deleted when that is over")
            key = self.picture(job_id)
            connection.execute("DELETE FROM results WHERE job_id = ?", (job_id,))
            connection.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))
        if key is not None:
            self._pictures.delete(key)

    def result(self, job_id: str) -> Result | None:
        """What is known of a job's result, without its bytes."""
        row = self._database.row(
            "SELECT job_id, ext, prompt, generation_meta, worker_id, seconds, created_at, size_bytes"
            " FROM results WHERE job_id = ?",
            (job_id,),
        )
        if row is None:
            return None
        facts = dict(row)
        facts["generation_meta"] = json.loads(row["generation_meta"] or "null")
        return Result(**facts)

    def picture(self, job_id: str) -> str | None:
        """The key of a job's result."""
        row = self._database.row("SELECT key FROM results WHERE job_id = ?", (job_id,))
        return None if row is None else str(row["key"])

    def _change(self, job_id: str, rule: Callable[[QueuedJob], QueuedJob]) -> QueuedJob:
        with self._database.writing() as connection:
            return _save(connection, rule(self._require(job_id)))

    def _require(self, job_id: str) -> QueuedJob:
        job = self.get(job_id)
        if job is None:
            raise rules.RuleBroken(f"job {job_id} is unknown")
        return job


def _save(connection: sqlite3.Connection, job: QueuedJob) -> QueuedJob:
    # Only inside writing(): the lock is held, so that reading and writing are one step.
    assignments = ", ".join(f"{column} = ?" for column in _COLUMNS)
    connection.execute(f"UPDATE jobs SET {assignments} WHERE job_id = ?", (*_values(job), job.job_id))
    return job


def _values(job: QueuedJob) -> tuple[Any, ...]:
    facts = {column: getattr(job, column) for column in _COLUMNS}
    facts["rejections"] = {who: asdict(rejection) for who, rejection in job.rejections.items()}
    return tuple(json.dumps(value) if column in _JSON else value for column, value in facts.items())


def _job(row: Row) -> QueuedJob:
    facts: dict[str, Any] = {column: row[column] for column in _COLUMNS}
    facts.update({column: json.loads(row[column]) for column in _JSON})
    facts["rejections"] = rejections_of(row)
    return QueuedJob(**facts | {"status": JobStatus(row["status"])})
