"""What :mod:`turns` has to know of the database, and what it leaves there: lines, turns, models made last.

A *line* is what one submitter has waiting in one priority. All of it is part of a step of the queue, which
hands its connection on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import groupby, islice
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, literal_column, select, union_all, update

from studio_worker.local_studio import turns
from studio_worker.local_studio.rules import QueuedJob, Rejection
from studio_worker.local_studio.storage.database import upsert
from studio_worker.local_studio.storage.tables import IS_REJECTED, IS_UNREJECTED, jobs, last_made
from studio_worker.local_studio.storage.tables import turns as turns_table
from studio_worker.local_studio.turns import Crew, Patience, Waiting

_TURNS_KEPT = 1000
"""Whoever has not been served for so many turns counts as new."""

_LINE = (jobs.c.priority, jobs.c.submitter)
_IS_QUEUED = jobs.c.status == "queued"

# Of each priority, submitter and model the oldest, and how many it stands for; all that were rejected, for
# turns.next_for() needs them.
_heads = union_all(
    select(func.min(jobs.c.seq).label("seq"), func.count().label("alike"))
    .where(_IS_QUEUED, IS_UNREJECTED)
    .group_by(*_LINE, jobs.c.model),
    select(jobs.c.seq, literal_column("1")).where(_IS_QUEUED, IS_REJECTED),
).subquery()
_HEADS = select(
    jobs.c.seq,
    jobs.c.job_id,
    jobs.c.model,
    *_LINE,
    jobs.c.passed_at,
    jobs.c.rejections,
    _heads.c.alike,
).join_from(_heads, jobs, jobs.c.seq == _heads.c.seq)

_lengths = (
    select(*_LINE, func.count().label("length"), func.min(jobs.c.seq).label("first"))
    .where(_IS_QUEUED)
    .group_by(*_LINE)
    .subquery()
)
_LINES = (
    select(_lengths.c.priority, _lengths.c.submitter, _lengths.c.length)
    .outerjoin_from(
        _lengths,
        turns_table,
        (turns_table.c.priority == _lengths.c.priority) & (turns_table.c.submitter == _lengths.c.submitter),
    )
    .order_by(_lengths.c.priority.desc(), func.coalesce(turns_table.c.number, 0), _lengths.c.first)
)

# Made once: to make a statement costs more than to run it.
_MADE = select(last_made.c.worker_id, last_made.c.model)
_SERVED = select(turns_table)
_PASS = update(jobs).where(jobs.c.job_id.in_(bindparam("passed", expanding=True)))
_FORGET = delete(turns_table).where(turns_table.c.number <= bindparam("last"))
_NUMBERS = (
    select(jobs.c.seq)
    .where(_IS_QUEUED, *(column == bindparam(column.name) for column in _LINE))
    .order_by(jobs.c.seq)
    .limit(bindparam("most"))
)


class Lines:
    """All lines as they are within one step, and whose turn it is."""

    def __init__(self, connection: Connection, ready: Collection[str]) -> None:
        self._connection = connection
        loaded = connection.execute(_MADE).all()
        self._crew = Crew(frozenset(ready), {row.worker_id: row.model for row in loaded})
        served = connection.execute(_SERVED).all()
        self._numbers = {(row.priority, row.submitter): row.number for row in served}
        self._waiting = [_waiting(row) for row in connection.execute(_HEADS).mappings().all()]

    def choose(self, worker_id: str, now: float, patience: Patience) -> str | None:
        """The id of the job that this worker is to be offered; notes whose turn was passed over for it."""
        choice = turns.next_for(worker_id, self._waiting, self._crew, self._numbers, now, patience)
        if choice.passed:
            self._connection.execute(_PASS, {"passed": choice.passed, "passed_at": now})
        return choice.job_id

    def leave_out(self, job_id: str) -> None:
        """Somebody is changing this job at the moment."""
        self._waiting = [job for job in self._waiting if job.job_id != job_id]

    def take_turn(self, job: QueuedJob) -> None:
        """Whoever queued this job was served."""
        number = max(self._numbers.values(), default=0) + 1
        turn = {"priority": job.priority, "submitter": job.submitter, "number": number}
        upsert(self._connection, turns_table, turn)
        last = number - _TURNS_KEPT
        if any(before <= last for before in self._numbers.values()):
            self._connection.execute(_FORGET, {"last": last})


def made(connection: Connection, worker_id: str, model: str) -> None:
    """The worker has this model loaded."""
    upsert(connection, last_made, {"worker_id": worker_id, "model": model})


def in_turn(connection: Connection, limit: int, offset: int) -> list[int]:
    """The numbers of jobs in the order of turns, as if all workers had one model and rejected nothing."""
    found: list[int] = []
    numbers: dict[tuple[int, str], list[int]] = {}
    for priority, submitter, nth in islice(_order(connection), offset, offset + limit):
        if (priority, submitter) not in numbers:
            line = {"priority": priority, "submitter": submitter, "most": offset + limit}
            numbers[priority, submitter] = list(connection.execute(_NUMBERS, line).scalars())
        found += numbers[priority, submitter][nth : nth + 1]
    return found


def _order(connection: Connection) -> Iterator[tuple[int, str, int]]:
    for priority, rows in groupby(connection.execute(_LINES).all(), lambda row: row.priority):
        lines = [(row.submitter, row.length) for row in rows]
        nth = 0
        while lines:
            yield from ((priority, submitter, nth) for submitter, _ in lines)
            nth += 1
            lines = [(submitter, length) for submitter, length in lines if length > nth]


def rejections_of(row: Mapping[Any, Any]) -> dict[str, Rejection]:
    """What a job's row says of who rejected it."""
    return {who: Rejection(**said) for who, said in row["rejections"].items()}


def _waiting(row: Mapping[Any, Any]) -> Waiting:
    return Waiting(
        job_id=row["job_id"],
        number=row["seq"],
        model=row["model"],
        priority=row["priority"],
        submitter=row["submitter"],
        passed_at=row["passed_at"],
        rejections=rejections_of(row),
        alike=row["alike"],
    )
