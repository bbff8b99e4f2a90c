"""The simulation in small; the long one is ``make farm``."""

from __future__ import annotations

from pathlib import Path

import psycopg

from tests.farm import faults, people
from tests.farm.bare_loop import jobs_per_second
from tests.farm.farm import Size
from tests.farm.postgres import Cluster
from tests.farm.s3 import S3Server
from tests.farm.s3_proxy import S3Proxy
from tests.farm.simulation import is_clean, one_desk, one_farm, table
from tests.farm.stores import Bucket


def test_one_desk_loses_nothing_while_everything_fails(tmp_path: Path) -> None:
    """A studio on SQLite is killed, stopped and frozen, sessions drop: each job ends once, and in turn."""
    size = Size(seed=1, jobs=200, people=12, workers=20, processes=1, faults=5, makes_s=0.2, loads_s=0.4)
    outcome = one_desk(tmp_path / "desk", size)
    assert is_clean(outcome), table("one desk", outcome)
    assert outcome.faults.total() == 5
    assert outcome.done + len(outcome.book.account.hopeless) >= 200


def test_farm_loses_nothing_while_everything_fails(
    tmp_path: Path, postgres: Cluster, s3_server: S3Server
) -> None:
    """Studios die, database and picture store go away, sessions drop: each job ends once, and in turn."""
    size = Size(seed=1, jobs=200, people=12, workers=20, processes=2, faults=7, makes_s=0.2, loads_s=0.4)
    with S3Proxy(s3_server.port, seed=1) as proxy:
        outcome = one_farm(tmp_path / "farm", size, postgres, Bucket(s3_server, proxy))
    assert is_clean(outcome), table("the farm", outcome)
    assert set(outcome.faults) == set(faults.WEIGHTS)
    assert outcome.done + len(outcome.book.account.hopeless) >= 200


def test_bare_loop_does_every_job_once(database_url: str) -> None:
    """What the farm is measured beside is a queue that works."""
    assert jobs_per_second(database_url, jobs=50, clients=4, makes_s=0.01) > 0
    with psycopg.connect(database_url) as connection:
        done = connection.execute(
            "SELECT count(*), count(DISTINCT worker) FROM bare_jobs WHERE status = 'done'"
        )
        assert done.fetchone() == (50, 4)


def test_farm_follows_the_same_script_for_the_same_seed() -> None:
    """A run that found something can be run again: the same people, jobs and faults."""
    assert people.plan(7, 500, 50) == people.plan(7, 500, 50) != people.plan(8, 500, 50)
    first = faults.script(7, 500, 40, list(faults.WEIGHTS))
    assert first == faults.script(7, 500, 40, list(faults.WEIGHTS))
    assert {fault.kind for fault in first} == set(faults.WEIGHTS)
