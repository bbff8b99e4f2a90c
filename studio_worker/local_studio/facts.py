"""What the metrics say of the line, asked of the database at the moment of asking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import func, select

from studio_worker.local_studio.rules import JobStatus
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.tables import jobs

_WAITING = (
    select(jobs.c.model, func.count(), func.min(jobs.c.created_at))
    .where(jobs.c.status == JobStatus.QUEUED)
    .group_by(jobs.c.model)
)


@dataclass(frozen=True)
class Waiting:
    """The jobs of one model that wait."""

    jobs: int
    oldest_at: float


@dataclass(frozen=True)
class Facts:
    """How the studio stands. ``queue`` is by model, ``jobs`` by status, ``sessions`` by state.

    Where the database does not answer, what would be in it is missing.
    """

    queue: Mapping[str, Waiting] = field(default_factory=dict)
    jobs: Mapping[str, int] = field(default_factory=dict)
    sessions: Mapping[str, int] = field(default_factory=dict)
    registrations: int | None = None
    certificate_ends_at: float | None = None
    has_database: bool = True


def waiting_in(database: Database) -> dict[str, Waiting]:
    """How many jobs wait, and since when the oldest does, by model."""
    with database.reading() as connection:
        rows = connection.execute(_WAITING).all()
    return {model: Waiting(count, oldest_at) for model, count, oldest_at in rows}
