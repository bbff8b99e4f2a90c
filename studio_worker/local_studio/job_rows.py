"""One job as a row: how it is found, locked and written. What becomes of it is the queue's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    bindparam,
    delete,
    exists,
    or_,
    select,
    update,
)

from studio_worker.local_studio import rules
from studio_worker.local_studio.rules import JobStatus, QueuedJob, Rejection
from studio_worker.local_studio.storage.database import insert_new, upsert
from studio_worker.local_studio.storage.tables import jobs, lines

_COLUMNS = tuple(field.name for field in fields(QueuedJob))


def is_held(table: FromClause) -> ColumnElement[bool]:
    """The condition that a worker has the job of a row."""
    return or_(*(table.c.status == status for status in rules.HELD))


# Made once: to make a statement costs more than to run it. "wanted" is what the job is known by.
ALL = select(*(jobs.c[name] for name in _COLUMNS))
ONE = ALL.where(jobs.c.job_id == bindparam("wanted"))
LOCKED = ONE.with_for_update()
HELD = ALL.where(is_held(jobs))
HELD_BY = HELD.where(jobs.c.worker_id == bindparam("wanted"))
_in_hand = jobs.alias("in_hand")
HAS_NONE = ~exists().where(_in_hand.c.worker_id == bindparam("for_whom"), is_held(_in_hand))
"""The worker for whom it is holds no job."""
FREE = ONE.where(jobs.c.status == JobStatus.QUEUED, HAS_NONE).with_for_update(skip_locked=True)
"""If it is queued, nobody is changing it at this moment, and the worker holds none."""
_LINE = ("priority", "submitter", "model")
_FEWER = (
    update(lines)
    .where(*(lines.c[name] == bindparam(f"its_{name}") for name in _LINE))
    .values(length=lines.c.length - 1)
    .returning(lines.c.length)
)
_NO_MORE = delete(lines).where(*(lines.c[name] == bindparam(name) for name in _LINE), lines.c.length == 0)
_CHANGE = update(jobs).where(jobs.c.job_id == bindparam("changed"))


def find(connection: Connection, query: Select[Any], wanted: str, **besides: str) -> QueuedJob | None:
    """The job that a query of this module finds."""
    row = connection.execute(query, {"wanted": wanted, **besides}).mappings().first()
    return None if row is None else job_of(row)


def require(connection: Connection, job_id: str, query: Select[Any] = LOCKED) -> QueuedJob:
    """The job of this id. Raises UnknownJob."""
    job = find(connection, query, job_id)
    if job is None:
        raise rules.UnknownJob(f"job {job_id} is unknown")
    return job


def add(connection: Connection, job: QueuedJob) -> bool:
    """A new row, the last of all, or that of the same order, which came before; whether it is new.

    Raises:
        RuleBroken: another order has the id.
    """
    if not insert_new(connection, jobs, _values(job)):
        if (there := find(connection, ONE, job.job_id)) is not None:
            rules.require_same_order(there, job)
        return False
    _count(connection, None, job)
    return True


def save(connection: Connection, before: QueuedJob, after: QueuedJob) -> QueuedJob:
    """Write what has changed. Only within ``writing()``, with the row locked: a step is one thing."""
    was, is_now = _values(before), _values(after)
    changes = {name: value for name, value in is_now.items() if value != was[name]}
    if changes:
        connection.execute(_CHANGE, changes | {"changed": after.job_id})
    _count(connection, before, after)
    return after


def remove(connection: Connection, job: QueuedJob) -> None:
    """Its row goes. Only within ``writing()``, with the row locked."""
    connection.execute(delete(jobs).where(jobs.c.job_id == job.job_id))
    _count(connection, job, None)


def job_of(row: Mapping[Any, Any]) -> QueuedJob:
    """The job in a row of ALL."""
    facts = {name: row[name] for name in _COLUMNS}
    return QueuedJob(**facts | {"status": JobStatus(row["status"]), "rejections": rejections_of(row)})


def rejections_of(row: Mapping[Any, Any]) -> dict[str, Rejection]:
    """What a job's row says of who rejected it."""
    return {who: Rejection(**said) for who, said in row["rejections"].items()}


def _count(connection: Connection, before: QueuedJob | None, after: QueuedJob | None) -> None:
    """Keep the length of the job's line. After the job's own row, so that all lock in one order."""
    if _is_in_line(before) == _is_in_line(after):
        return
    line = {name: getattr(after or before, name) for name in _LINE}
    if _is_in_line(after):
        upsert(connection, lines, {**line, "length": 1}, add=("length",))
    elif connection.execute(_FEWER, {f"its_{name}": said for name, said in line.items()}).scalar() == 0:
        connection.execute(_NO_MORE, line)


def _is_in_line(job: QueuedJob | None) -> bool:
    return job is not None and job.status is JobStatus.QUEUED and not job.rejections


def _values(job: QueuedJob) -> dict[str, Any]:
    facts = {name: getattr(job, name) for name in _COLUMNS}
    return facts | {"rejections": {who: asdict(said) for who, said in job.rejections.items()}}
