"""What the database itself says of the steps of jobs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.rules import QueuedJob
from studio_worker.local_studio.storage.postgres import PostgresDatabase
from tests.farm import history
from tests.farm.fairness import broken_turns

IN_THE_MIDST = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@contextmanager
def commits_held_up(server: psycopg.Connection) -> Iterator[None]:
    """Commits are written down, and wait for a standby that is not there; but not ``local`` ones."""
    _set(server, "nobody")
    try:
        yield
    finally:
        _set(server, "")


def _set(server: psycopg.Connection, standby: str) -> None:
    server.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standby}'".encode())
    server.execute("SELECT pg_reload_conf()")
    while server.execute("SHOW synchronous_standby_names").fetchone() != (standby,):
        pass


def job(name: str, submitter: str) -> QueuedJob:
    task = {"kind": "image", "prompt": "a fox"}
    return QueuedJob(name, model="A", task=task, model_source={}, created_at=0.0, submitter=submitter)


def test_step_counts_from_when_others_see_it(database_url: str, tmp_path: Path) -> None:
    """A job whose commit was written down, and not seen yet, is not one that offers should have known."""
    local = f"{database_url}&options=-c%20synchronous_commit%3Dlocal"
    databases = [PostgresDatabase(url, lambda: None) for url in (local, database_url)]
    queue, slow = (JobQueue(database, Folder(tmp_path)) for database in databases)
    history.watch_postgres(database_url)
    for name in ("ann-1", "ann-2"):
        queue.add(job(name, "ann"))
    with psycopg.connect(database_url, autocommit=True) as server:
        with commits_held_up(server):
            coming = threading.Thread(target=slow.add, args=(job("bob-1", "bob"),))
            coming.start()
            while not server.execute(IN_THE_MIDST).fetchone():
                pass
            offered = [queue.take_next(worker) for worker in ("north", "south")]
        coming.join()
    assert [each and each.job_id for each in offered] == ["ann-1", "ann-2"]
    seen = history.read_postgres(database_url)
    steps = [(step.job_id, step.became) for step in seen.events]
    assert steps.index(("ann-1", "offered")) < steps.index(("bob-1", "queued"))
    assert broken_turns(seen).unfair == []
    for database in databases:
        database.close()
