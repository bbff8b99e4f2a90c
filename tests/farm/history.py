"""What happened to every job, as the database itself wrote it down: a witness unknown to the studio.

A trigger on the table ``jobs`` notes each step of a job, whoever took it, with the times between which the
transaction looked, wrote and committed. Both databases have it; SQLite has one writer at a time, so there all
three are one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg

Became = Literal["queued", "offered", "done", "failed"]


@dataclass(frozen=True)
class Job:
    """What a job is when all is over. ``number`` grows in the order of coming."""

    job_id: str
    number: int
    model: str
    priority: int
    submitter: str
    status: str
    reason: str | None = None
    completions: int = 0
    results: int = 0


@dataclass(frozen=True)
class Event:
    """One step of one job. Times are Unix seconds.

    ``worker_id`` is who got it, made it, or gave it back. ``began`` is when the transaction began, so nothing
    that it read is older; ``at`` when it wrote; ``committed`` when others could see it, as far as is known.
    """

    job_id: str
    became: Became
    worker_id: str = ""
    is_rejected: bool = False
    began: float = 0.0
    at: float = 0.0
    committed: float = 0.0


@dataclass(frozen=True)
class History:
    """All jobs, and all their steps in the order in which they could be seen."""

    jobs: Sequence[Job]
    events: Sequence[Event]


# An accept changes nothing about whose turn it is, and is every fourth step.
_SQLITE_WITNESS = """
CREATE TABLE witness (
    n INTEGER PRIMARY KEY, job_id TEXT, became TEXT, worker_id TEXT, is_rejected INTEGER, at REAL);
CREATE TRIGGER witness_insert AFTER INSERT ON jobs BEGIN
    INSERT INTO witness (job_id, became, is_rejected, at)
    VALUES (NEW.job_id, NEW.status, 0, (julianday('now') - 2440587.5) * 86400.0);
END;
CREATE TRIGGER witness_update AFTER UPDATE ON jobs
WHEN OLD.status <> NEW.status AND NEW.status <> 'running' BEGIN
    INSERT INTO witness (job_id, became, worker_id, is_rejected, at)
    VALUES (NEW.job_id, NEW.status, coalesce(NEW.worker_id, OLD.worker_id), OLD.rejections <> NEW.rejections,
        (julianday('now') - 2440587.5) * 86400.0);
END;
"""

_POSTGRES_WITNESS = """
CREATE TABLE witness (
    n bigint GENERATED ALWAYS AS IDENTITY, job_id text, became text, worker_id text, is_rejected boolean,
    began double precision DEFAULT extract(epoch FROM now()),
    at double precision DEFAULT extract(epoch FROM clock_timestamp()),
    transaction xid8 DEFAULT pg_current_xact_id(), seen pg_snapshot DEFAULT pg_current_snapshot());
CREATE INDEX ON witness (at);
CREATE FUNCTION witness_insert() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO witness (job_id, became, is_rejected) VALUES (NEW.job_id, NEW.status, false);
    RETURN NULL;
END $$;
CREATE FUNCTION witness_update() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO witness (job_id, became, worker_id, is_rejected)
    VALUES (NEW.job_id, NEW.status, coalesce(NEW.worker_id, OLD.worker_id), OLD.rejections <> NEW.rejections);
    RETURN NULL;
END $$;
CREATE TRIGGER witness_insert AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION witness_insert();
CREATE TRIGGER witness_update AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status <> NEW.status AND NEW.status <> 'running') EXECUTE FUNCTION witness_update();
"""

_JOBS = """
SELECT job_id, seq, model, priority, submitter, status, reason, completions,
    (SELECT count(*) FROM results WHERE results.job_id = jobs.job_id) FROM jobs ORDER BY seq"""
_SQLITE_EVENTS = """
SELECT job_id, became, coalesce(worker_id, ''), is_rejected, at, at, at FROM witness ORDER BY n"""
# The time that a commit bears is that of its writing down, before others see it: a step that was taken later
# and did not see it knows better.
_POSTGRES_EVENTS = """
WITH written AS MATERIALIZED (SELECT *,
    extract(epoch FROM pg_xact_commit_timestamp(transaction::xid))::double precision AS written FROM witness)
SELECT job_id, became, coalesce(worker_id, ''), is_rejected, began, at,
    greatest(written, (SELECT max(later.at) FROM witness later
        WHERE later.at > written AND later.at < written + 0.5 AND later.transaction <> written.transaction
        AND NOT pg_visible_in_snapshot(written.transaction, later.seen))) AS committed
FROM written ORDER BY committed, n"""


def watch_sqlite(path: Path) -> None:
    """Have the steps of jobs in this studio's file noted from now on."""
    with sqlite3.connect(path, timeout=30) as connection:
        connection.executescript(_SQLITE_WITNESS)
    connection.close()


def read_sqlite(path: Path) -> History:
    """What was noted."""
    with sqlite3.connect(path, timeout=30) as connection:
        jobs, events = connection.execute(_JOBS).fetchall(), connection.execute(_SQLITE_EVENTS).fetchall()
    connection.close()
    return _history(jobs, events)


def watch_postgres(url: str) -> None:
    """Have the steps of jobs in this studio's database noted; the server has ``track_commit_timestamp``."""
    with psycopg.connect(url) as connection:
        connection.execute(_POSTGRES_WITNESS)


def read_postgres(url: str) -> History:
    """What was noted."""
    with psycopg.connect(url) as connection:
        return _history(connection.execute(_JOBS).fetchall(), connection.execute(_POSTGRES_EVENTS).fetchall())


def _history(jobs: Sequence[Any], events: Sequence[Any]) -> History:
    return History([Job(*row) for row in jobs], [Event(*row) for row in events])
