"""A database that is there and does not work, as people, workers and load balancers feel it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import LiteralString, cast

import psycopg
import pytest
import requests

from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import Folder, StorageAway
from studio_worker.local_studio.presence import Presence
from studio_worker.local_studio.rules import QueuedJob
from studio_worker.local_studio.storage.bounded import LIMIT_S, BoundedConnection, StandsStill, dial
from studio_worker.local_studio.storage.locks import Lock, look_at_all
from studio_worker.local_studio.storage.postgres import PostgresDatabase
from tests.fakes.machine import WAIT_S, Machine, queue
from tests.farm.postgres import Cluster

STOP_S = 60.0
"""A studio that stops well before a service manager kills it."""
_CLERK = "clerk"

Trouble = Callable[[Cluster, str], AbstractContextManager[None]]


@contextlib.contextmanager
def stands_still(cluster: Cluster, _url: str) -> Iterator[None]:
    cluster.stand_still()
    try:
        yield
    finally:
        cluster.go_on()


@contextlib.contextmanager
def is_locked(_cluster: Cluster, url: str) -> Iterator[None]:
    with psycopg.connect(url) as somebody:
        somebody.execute("LOCK TABLE jobs")
        yield


@contextlib.contextmanager
def is_read_only(cluster: Cluster, _url: str) -> Iterator[None]:
    with psycopg.connect(cluster.url(), autocommit=True) as operator:
        operator.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        operator.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            operator.execute("SET default_transaction_read_only = off")
            operator.execute("ALTER SYSTEM RESET default_transaction_read_only")
            operator.execute("SELECT pg_reload_conf()")


@contextlib.contextmanager
def altered(url: str, do: LiteralString, undo: LiteralString) -> Iterator[None]:
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(do)
        try:
            yield
        finally:
            operator.execute(undo)


def lacks_a_table(_cluster: Cluster, url: str) -> AbstractContextManager[None]:
    return altered(url, "ALTER TABLE jobs RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO jobs")


def lets_nobody_work(_cluster: Cluster, url: str) -> AbstractContextManager[None]:
    return altered(url, "ALTER TABLE jobs OWNER TO studio", f"ALTER TABLE jobs OWNER TO {_CLERK}")


TROUBLES: list[Trouble] = [stands_still, is_locked, is_read_only, lacks_a_table, lets_nobody_work]


@pytest.fixture
def clerks_url(postgres: Cluster, database_url: str) -> Iterator[str]:
    """A database's address for a user who may do in it what its owner may, and nothing else."""
    name = database_url.partition("?")[0].rpartition("/")[2]
    with psycopg.connect(postgres.url(), autocommit=True) as operator:
        operator.execute(f"CREATE ROLE {_CLERK} LOGIN")
        operator.execute(f"ALTER DATABASE {name} OWNER TO {_CLERK}")
        yield database_url.replace("//studio@", f"//{_CLERK}@")
        operator.execute(f"DROP DATABASE {name} WITH (FORCE)")
        operator.execute(f"CREATE DATABASE {name}")  # for whoever removes it
        operator.execute(f"DROP ROLE {_CLERK}")


@pytest.fixture
def studio(clerks_url: str, tmp_path: Path) -> Iterator[LocalStudio]:
    with LocalStudio(Places(clerks_url, Folder(tmp_path / "pictures"))) as running:
        yield running


def status(studio: LocalStudio, path: str) -> int:
    return requests.get(f"{studio.base_url}{path}", timeout=WAIT_S).status_code


def await_status(studio: LocalStudio, path: str, expected: int) -> None:
    """Until the studio says so; its database is asked about once a second."""
    waited = threading.Event()
    for _ in range(int(WAIT_S * 2)):
        if status(studio, path) == expected:
            return
        waited.wait(0.5)
    pytest.fail(f"{path} did not become {expected}")


@pytest.mark.parametrize("trouble", TROUBLES)
def test_process_whose_database_does_not_work_says_so_and_goes_on(
    trouble: Trouble,
    studio: LocalStudio,
    postgres: Cluster,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It lives and is not ready, queues nothing, keeps its sessions, and works again by itself; its log has a
    line, and no traceback, for what it could not do.
    """
    caplog.set_level(logging.INFO)
    machine = Machine(studio).connect()
    job_id = queue(studio)
    machine.take()
    machine.beat(job_id)
    with trouble(postgres, database_url):
        await_status(studio, "/health/ready", 503)
        for _ in range(3):
            machine.beat(job_id)
            assert status(studio, "/health/live") == 200
            assert status(studio, "/health/ready") == 503
            order = {"model": "placeholder", "task": {"kind": "image", "prompt": "a red potion"}}
            answer = requests.post(f"{studio.base_url}/api/jobs", json=order, timeout=WAIT_S)
            assert answer.status_code == 503, answer.text
            assert status(studio, f"/api/jobs/{job_id}") in {200, 503}
        text = requests.get(f"{studio.base_url}/metrics", timeout=WAIT_S).text
        assert "local_studio_database_up 0.0" in text
    await_status(studio, "/health/ready", 200)
    machine.beat(job_id)
    assert studio.job(job_id).status == "running"
    assert machine.upload(job_id).status_code == 200
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
    machine.hang_up()


def test_process_can_be_stopped_while_its_database_stands_still(
    studio: LocalStudio, postgres: Cluster
) -> None:
    """It does not wait for the server to be told to end."""
    machine = Machine(studio).connect()
    stopping = threading.Thread(target=studio.stop, daemon=True)
    postgres.stand_still()
    try:
        stopping.start()
        stopping.join(STOP_S)
        assert not stopping.is_alive()
        assert machine.closing()[1] == 1012
    finally:
        postgres.go_on()


def test_step_with_much_to_do_is_given_its_time(database_url: str, postgres: Cluster, tmp_path: Path) -> None:
    """A start that must wait for another process's migration waits for as long as that takes."""
    started = threading.Event()

    def start() -> None:
        PostgresDatabase(database_url, lambda: None).close()
        started.set()

    PostgresDatabase(database_url, lambda: None).close()
    with psycopg.connect(database_url) as other:
        other.execute("LOCK TABLE alembic_version")
        starting = threading.Thread(target=start)
        starting.start()
        assert not started.wait(6.0)
    starting.join(WAIT_S)
    assert started.is_set()


def test_start_that_waits_for_another_says_so(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever starts a process that waits for another one's migration learns what it waits for."""
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (int(Lock.MIGRATION),))
        starting = threading.Thread(target=lambda: PostgresDatabase(database_url, lambda: None).close())
        starting.start()
        waited = threading.Event()
        for _ in range(int(WAIT_S / 0.05)):
            if "another process has the tables in hand; waiting for it" in caplog.messages:
                break
            waited.wait(0.05)
        else:
            pytest.fail("it says nothing")
        assert starting.is_alive()
    starting.join(WAIT_S)
    assert not starting.is_alive()


def test_step_that_takes_too_long_is_given_up_alone(database_url: str) -> None:
    """Who asks for too much is told so; others, and what keeps the house, go on."""
    database = PostgresDatabase(database_url, lambda: None)
    asked = f"SELECT pg_sleep({LIMIT_S + 1})"
    with database.reading() as connection:
        look_at_all(connection)
        connection.exec_driver_sql(asked)
    with pytest.raises(StorageAway, match="did not answer in time"), database.reading() as connection:
        connection.exec_driver_sql(asked)
    waited = threading.Event()
    for _ in range(100):
        with contextlib.suppress(StorageAway):
            database.check()
            break
        waited.wait(0.01)
    else:
        pytest.fail("nobody is let in")
    database.close()


def test_step_that_is_slow_at_each_turn_is_given_up(database_url: str) -> None:
    """A server that is late with each answer holds nobody for longer than one that gives none."""
    database = PostgresDatabase(database_url, lambda: None)
    asked: list[int] = []

    def step() -> None:
        with database.reading() as connection:
            for number in range(5):
                asked.append(number)
                connection.exec_driver_sql(f"SELECT pg_sleep({LIMIT_S / 2.5})")

    with pytest.raises(StorageAway, match="did not answer in time"):
        step()
    assert asked == [0, 1, 2]
    database.close()


def test_turn_that_is_not_let_go_of_holds_up_offers_alone(database_url: str, tmp_path: Path) -> None:
    """A process that stands still while it gives a job away keeps others from that, and from nothing else: of
    all that could have a job only one waits for it, and not for long.
    """
    database = PostgresDatabase(database_url, lambda: None)
    queue = JobQueue(database, Folder(tmp_path))
    queue.add(QueuedJob("a job", "a model", task={}, model_source={}, created_at=0.0))
    with psycopg.connect(database_url) as still:
        still.execute("SELECT pg_advisory_xact_lock(%s)", (int(Lock.TURNS),))
        assert queue.lookout.sees_one_for("worker", lambda _: ())
        with pytest.raises(StorageAway, match="somebody else keeps"):
            queue.take_next("worker")
        assert not queue.lookout.sees_one_for("other", lambda _: ())
        database.check()
    assert queue.take_next("worker") is not None
    database.close()


def test_who_gets_no_connection_is_refused_alone(
    clerks_url: str, postgres: Cluster, database_url: str
) -> None:
    """Where others have taken all connections of the server, those that the studio has are worked with."""
    name = database_url.partition("?")[0].rpartition("/")[2]
    database = PostgresDatabase(clerks_url, lambda: None)
    with psycopg.connect(postgres.url(), autocommit=True) as operator:
        operator.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 1")
    with database.reading() as connection:
        with pytest.raises(StorageAway, match="takes no more connections"):
            database.check()
        connection.exec_driver_sql("SELECT 1")
    database.check()
    database.close()


def test_nameserver_that_says_nothing_is_not_waited_for() -> None:
    """Whoever looks for a server by its name does not wait for ever; what comes late is closed."""
    found, closed = threading.Event(), threading.Event()

    class Late:
        def close(self) -> None:
            closed.set()

    def connect() -> BoundedConnection:
        found.wait(WAIT_S)
        return cast(BoundedConnection, Late())

    with pytest.raises(StandsStill):
        dial(connect, 0.05)
    found.set()
    assert closed.wait(WAIT_S)


def test_beat_waits_for_nobody(database_url: str) -> None:
    """Of two processes that come back after an outage each says that it lives, and neither waits for the
    other's row, which it would forget.
    """
    database = PostgresDatabase(database_url, lambda: None)
    here = Presence(database, "here")
    with psycopg.connect(database_url) as other, psycopg.connect(database_url, autocommit=True) as reader:

        def known() -> set[str]:
            return {name for (name,) in reader.execute("SELECT process_id FROM processes")}

        reader.execute("INSERT INTO processes VALUES ('there', 'http://there', 0, 0)")
        other.execute("UPDATE processes SET beat_at = 1 WHERE process_id = 'there'")
        here.beat("http://here")
        assert known() == {"here", "there"}
        other.rollback()
        here.beat("http://here")
        assert known() == {"here"}
    database.close()


def test_server_that_stands_still_is_waited_for_once(database_url: str, postgres: Cluster) -> None:
    """After the first step that waited in vain nobody waits any more, and all are told so."""
    database = PostgresDatabase(database_url, lambda: None)
    database.check()
    asked: list[bool] = []

    def ask() -> None:
        for _ in range(1000):
            with pytest.raises(StorageAway):
                database.check()
            asked.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    postgres.stand_still()
    try:
        asking.start()
        asking.join(WAIT_S)
        assert len(asked) == 1000
    finally:
        postgres.go_on()
    database.close()
