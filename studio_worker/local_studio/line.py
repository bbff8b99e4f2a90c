"""What :mod:`turns` has to know of the database, and what it leaves there: lines, turns, models made last.

A *line* is what one submitter has waiting in one priority. All of it is part of a step of the queue, which
hands its connection on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import groupby, islice
from typing import Any

from sqlalchemy import (
    Connection,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
    union_all,
    update,
)

from studio_worker.local_studio import turns
from studio_worker.local_studio.job_rows import ALL, job_of, rejections_of
from studio_worker.local_studio.rules import QueuedJob
from studio_worker.local_studio.storage.database import upsert
from studio_worker.local_studio.storage.tables import IS_REJECTED, IS_UNREJECTED, jobs, last_made, lines
from studio_worker.local_studio.storage.tables import turns as turns_table
from studio_worker.local_studio.turns import Choice, Crew, Patience, Waiting

_TURNS_KEPT = 1000
"""Whoever has not been served for so many turns counts as new."""

_ABOVE_ALL = 1 << 30
"""More than any priority."""

_LINE = (jobs.c.priority, jobs.c.submitter)
_IS_QUEUED = jobs.c.status == "queued"

IS_ANY = or_(exists().select_from(lines), exists().where(_IS_QUEUED, IS_REJECTED).select_from(jobs))
"""A job waits. To look for one among all jobs would be to walk over those that have just been taken."""

IS_OWN = exists().where(last_made.c.worker_id == bindparam("for_whom"), lines.c.model == last_made.c.model)
"""One of the model that the worker made last."""

_any = jobs.alias("any_job")
_priority = (
    select(func.max(_any.c.priority))
    .where(_any.c.status == "queued", _any.c.priority < bindparam("below"))
    .scalar_subquery()
)
_mate = jobs.alias("mate")
_oldest = (
    select(func.min(_mate.c.seq))
    .where(_mate.c.status == "queued", IS_UNREJECTED)
    .where(*(_mate.c[name] == lines.c[name] for name in ("priority", "submitter", "model")))
    .correlate(lines)
    .scalar_subquery()
)
_last_number = select(func.max(turns_table.alias().c.number)).scalar_subquery()
_number = case((turns_table.c.number > _last_number - _TURNS_KEPT, turns_table.c.number), else_=0)
"""Of the last turn: rows of older ones lie there for a while."""

_loaded = select(last_made.c.model).where(last_made.c.worker_id == bindparam("worker")).scalar_subquery()
_head = (
    *(jobs.c.seq, jobs.c.job_id, jobs.c.model, *_LINE, jobs.c.passed_at, jobs.c.rejections),
    _number.label("number"),
    # What is asked besides goes along: each statement is a way to the server and back.
    _last_number.label("last_number"),
    _loaded.label("loaded"),
)
_turn = (turns_table.c.priority == jobs.c.priority) & (turns_table.c.submitter == jobs.c.submitter)

# Of the highest priority below some other: of each submitter and model the oldest, with how many it stands
# for; and all that were rejected, for turns.next_for() needs them.
_HEADS = union_all(
    select(*_head, lines.c.length.label("alike"))
    .select_from(lines.join(jobs, jobs.c.seq == _oldest).outerjoin(turns_table, _turn))
    .where(lines.c.priority == _priority),
    select(*_head, literal_column("1"))
    .select_from(jobs.outerjoin(turns_table, _turn))
    # Not by the index of all that wait in this priority (+ 0): there is one of the few that were rejected.
    .where(_IS_QUEUED, IS_REJECTED, jobs.c.priority + 0 == _priority),
)

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
    .order_by(_lengths.c.priority.desc(), _number, _lengths.c.first)
)

# Made once: to make a statement costs more than to run it.
_MADE = select(last_made.c.worker_id, last_made.c.model)
_PASS = update(jobs).where(jobs.c.job_id.in_(bindparam("passed", expanding=True)))
_FORGET = delete(turns_table).where(turns_table.c.number <= bindparam("last"))
_PART = (
    ALL.where(_IS_QUEUED, *(column == bindparam(column.name) for column in _LINE))
    .order_by(jobs.c.seq)
    .limit(bindparam("most"))
    .offset(bindparam("first"))
)


Ready = Callable[[Connection], Collection[str]]
"""Who could take a job now; asked only where it matters."""


class Lines:
    """All lines as they are within one step, and whose turn it is."""

    def __init__(self, connection: Connection, worker_id: str, ask_crew: Callable[[], Crew]) -> None:
        self._connection = connection
        self._worker_id = worker_id
        self._ask_crew = ask_crew
        self._last_number = 0
        self._crew: Crew | None = None
        self._left_out: set[str] = set()

    def choose(self, now: float, patience: Patience) -> str | None:
        """The id of the job that this worker is to be offered; notes whose turn was passed over for it."""
        for choice in self._choices(now, patience):
            if choice.passed:
                self._connection.execute(_PASS, {"passed": choice.passed, "passed_at": now})
            if choice.job_id is not None:
                return choice.job_id
        return None

    def is_worth_choosing(self, now: float, patience: Patience) -> bool:
        """Whether :meth:`choose` would find one, or note something; to be asked without any lock."""
        return any(choice.passed or choice.job_id for choice in self._choices(now, patience))

    def _choices(self, now: float, patience: Patience) -> Iterator[Choice]:
        """Of each priority, the highest first."""
        self._crew = None  # as old as the lines at most
        asked = {"worker": self._worker_id, "below": _ABOVE_ALL}
        while rows := self._connection.execute(_HEADS, asked).mappings().all():
            self._last_number = rows[0]["last_number"] or 0
            waiting = [_waiting(row) for row in rows if row["job_id"] not in self._left_out]
            numbers = {(row["priority"], row["submitter"]): row["number"] for row in rows}
            crew = self._crew_for(waiting, rows[0]["loaded"])
            yield turns.next_for(self._worker_id, waiting, crew, numbers, now, patience)
            asked["below"] = rows[0]["priority"]

    def leave_out(self, job_id: str) -> None:
        """Somebody has this job in hand, and keeps it."""
        self._left_out.add(job_id)

    def take_turn(self, job: QueuedJob) -> None:
        """Whoever queued this job was served."""
        number = self._last_number + 1
        turn = {"priority": job.priority, "submitter": job.submitter, "number": number}
        upsert(self._connection, turns_table, turn)
        if number % _TURNS_KEPT == 0:
            self._connection.execute(_FORGET, {"last": number - _TURNS_KEPT})

    def _crew_for(self, waiting: Collection[Waiting], loaded: str | None) -> Crew:
        """The others matter only where none waits of this worker's model, or somebody has rejected one."""
        is_own = loaded is not None and any(job.model == loaded for job in waiting)
        if loaded is not None and is_own and not any(job.rejections for job in waiting):
            return Crew(last_made={self._worker_id: loaded})
        self._crew = self._crew or self._ask_crew()
        return self._crew


def crew_now(connection: Connection, ready: Ready) -> Crew:
    """Who is there, and what everybody made last."""
    return Crew(frozenset(ready(connection)), {row.worker_id: row.model for row in connection.execute(_MADE)})


def made(connection: Connection, worker_id: str, model: str) -> None:
    """The worker has this model loaded."""
    upsert(connection, last_made, {"worker_id": worker_id, "model": model})


def in_turn(connection: Connection, limit: int, offset: int) -> list[QueuedJob]:
    """Jobs in the order of turns, as if all workers had one model and rejected nothing."""
    page = list(islice(_order(connection), offset, offset + limit))
    lengths = Counter((priority, submitter) for priority, submitter, _ in page)
    parts: dict[tuple[int, str], Iterator[QueuedJob]] = {}
    found: list[QueuedJob] = []
    for priority, submitter, nth in page:
        line = (priority, submitter)
        if line not in parts:  # what a page has of a line is one piece of it
            asked = {"priority": priority, "submitter": submitter, "first": nth, "most": lengths[line]}
            parts[line] = map(job_of, connection.execute(_PART, asked).mappings().all())
        found += islice(parts[line], 1)  # none, where somebody has just taken it
    return found


def _order(connection: Connection) -> Iterator[tuple[int, str, int]]:
    for priority, rows in groupby(connection.execute(_LINES).all(), lambda row: row.priority):
        lines = [(row.submitter, row.length) for row in rows]
        nth = 0
        while lines:
            yield from ((priority, submitter, nth) for submitter, _ in lines)
            nth += 1
            lines = [(submitter, length) for submitter, length in lines if length > nth]


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
