"""A studio on PostgreSQL: what is different from a file."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry
from websockets.exceptions import InvalidStatus

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import Folder, StorageAway
from studio_worker.local_studio.rules import QueuedJob, RuleBroken
from studio_worker.local_studio.storage.locks import Lock
from studio_worker.local_studio.storage.postgres import PostgresDatabase
from tests.fakes.machine import PICTURE, WAIT_S, Machine, queue
from tests.farm.postgres import Cluster

PROCESSES = 3
PEOPLE = 5
JOBS = 8
"""Of each person."""


@pytest.fixture
def places(database_url: str, tmp_path: Path) -> Places:
    return Places(database_url, Folder(tmp_path / "pictures"))


@pytest.fixture
def queues(database_url: str, tmp_path: Path) -> Iterator[list[JobQueue]]:
    """The queue as three processes have it."""
    with ExitStack() as opened:
        databases = [PostgresDatabase(database_url, lambda: None) for _ in range(PROCESSES)]
        for database in databases:
            opened.callback(database.close)
        yield [JobQueue(database, Folder(tmp_path / "pictures")) for database in databases]


def at_once(*calls: Callable[[], object]) -> None:
    """All of them on threads; none may fail."""
    failed: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def job(number: int, submitter: str = "", prompt: str = "a fox") -> QueuedJob:
    return QueuedJob(
        job_id=f"{submitter}-{number}",
        model="test",
        task={"kind": "image", "prompt": prompt},
        model_source={},
        created_at=1764000000.25 + number,
        submitter=submitter,
    )


# --- several processes ------------------------------------------------------------------------------


def test_processes_that_start_at_once_make_the_tables_once(places: Places) -> None:
    """Three that find an empty database all begin, and one of them brings what a new studio has."""
    studios: list[LocalStudio] = []
    at_once(*[lambda: studios.append(LocalStudio(places)) for _ in range(PROCESSES)])
    assert sorted(studio.database.is_new for studio in studios) == [False, False, True]
    assert [[model.model_id for model in studio.models()] for studio in studios] == [["placeholder"]] * 3
    assert len({studio.database.salt for studio in studios}) == 1
    for studio in studios:
        studio.stop()


def test_claims_of_several_processes_are_one_queue(queues: list[JobQueue]) -> None:
    """However many processes offer at the same moment, each job goes out once, and people take turns."""
    for number in range(JOBS):
        for person in range(PEOPLE):
            queues[0].add(job(number, f"person {person}"))
    offered: list[QueuedJob] = []

    def offer_all(process: int) -> None:
        for number in range(JOBS * PEOPLE):
            taken = queues[process].take_next(f"worker {process} {number}")
            if taken is None:
                return
            offered.append(taken)

    at_once(*[lambda process=each: offer_all(process) for each in range(PROCESSES)])  # type: ignore[misc]
    assert Counter(each.job_id for each in offered) == {
        f"person {person}-{number}": 1 for person in range(PEOPLE) for number in range(JOBS)
    }
    in_order = sorted(offered, key=lambda each: each.offered_at or 0)
    rounds = [int(each.job_id.rpartition("-")[2]) for each in in_order]
    assert rounds == sorted(rounds), "nobody has a second turn before all had their first"


def test_offers_are_made_one_at_a_time(queues: list[JobQueue], database_url: str) -> None:
    """While one process decides whose turn it is the others wait: nobody has two turns of one round."""
    queues[0].add(job(0))
    waits = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (int(Lock.TURNS),))
        taken: list[QueuedJob | None] = []
        offer = threading.Thread(target=lambda: taken.append(queues[0].take_next("worker")))
        offer.start()
        while other.execute(waits).fetchone() is None:
            assert offer.is_alive(), "it did not wait"
        other.execute("SELECT pg_advisory_unlock(%s)", (int(Lock.TURNS),))
        offer.join()
    assert [each and each.job_id for each in taken] == ["-0"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [("refused_uploads = 1", "person 0-0"), ("status = 'done'", "person 0-1")],
    ids=["it stays", "it is done"],
)
def test_job_that_is_being_changed_has_its_turn(
    queues: list[JobQueue], database_url: str, step: LiteralString, expected: str
) -> None:
    """A late picture of the job whose turn it is costs nobody a turn: the offer waits for its end."""
    for number, person in enumerate(["person 0", "person 0", "person 1"]):
        queues[0].add(job(number, person))
    waits = "SELECT 1 FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
    taken: list[QueuedJob | None] = []
    offer = threading.Thread(target=lambda: taken.append(queues[0].take_next("worker")))
    with psycopg.connect(database_url) as somebody, psycopg.connect(database_url, autocommit=True) as other:
        somebody.execute(f"UPDATE jobs SET {step} WHERE job_id = 'person 0-0'")
        offer.start()
        while offer.is_alive() and other.execute(waits).fetchone() is None:
            pass
    offer.join()
    assert [each and each.job_id for each in taken] == [expected]


def test_job_that_somebody_keeps_is_passed_over(queues: list[JobQueue], database_url: str) -> None:
    """A process that hangs with a job in hand does not hold up the others: the next one goes out."""
    for number in range(2):
        queues[0].add(job(number, f"person {number}"))
    with psycopg.connect(database_url) as somebody:
        somebody.execute("SELECT 1 FROM jobs WHERE job_id = 'person 0-0' FOR UPDATE")
        taken = queues[0].take_next("worker")
    assert taken is not None
    assert taken.job_id == "person 1-1"


def test_delivery_counts_once_over_all_processes(queues: list[JobQueue], tmp_path: Path) -> None:
    """Of deliveries of one job that come to all processes at once one is taken, and one picture is kept."""
    queues[0].add(job(0))
    assert queues[0].take_next("worker") is not None
    taken: list[int] = []

    def deliver(process: int) -> None:
        try:
            queues[process].deliver("-0", "worker", io.BytesIO(PICTURE), ext="webp", prompt=None)
        except RuleBroken:
            return
        taken.append(process)

    at_once(*[lambda process=each: deliver(process) for each in range(PROCESSES)])  # type: ignore[misc]
    assert len(taken) == 1
    assert len(list((tmp_path / "pictures").glob("*-*"))) == 1


def test_rows_say_what_was_written(queues: list[JobQueue]) -> None:
    """Times keep their fractions, JSON its NUL; only text, where PostgreSQL knows none, has it replaced."""
    queues[0].add(job(0, "per\0son", prompt="a\0fox"))
    (found,) = queues[1].listed()
    assert (found.created_at, found.task["prompt"]) == (1764000000.25, "a\0fox")
    assert found.submitter == "per\N{REPLACEMENT CHARACTER}son"


# --- a server that is away --------------------------------------------------------------------------


def test_server_that_is_away_is_503_until_it_is_back(
    postgres: Cluster, places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """While the server is away people are told to come again; workers stay, and all goes on by itself."""
    with LocalStudio(places) as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio, task={"prompt": "a secret fox"})
        machine.take()
        postgres.kill()
        try:
            answers = [
                requests.get(f"{studio.base_url}{path}", timeout=30)
                for path in ("/api/state", "/health/ready")
            ]
            assert [answer.status_code for answer in answers] == [503, 503]
            assert int(answers[0].headers["Retry-After"]) > 0
            assert machine.upload(job_id).status_code == 503
            machine.beat(job_id)
            with pytest.raises(InvalidStatus) as refused:
                machine.dial()
            assert refused.value.response.status_code == 503
            said = json.loads(refused.value.response.body)["error"]
            assert said == "what the studio keeps its data in does not answer"  # and nothing of where it is
        finally:
            postgres.start()
        with requests.Session() as client:  # that comes again, as it is told
            client.mount(
                "http://", HTTPAdapter(max_retries=Retry(8, status_forcelist={503}, backoff_factor=0.2))
            )
            assert client.get(f"{studio.base_url}/health/ready", timeout=WAIT_S).status_code == 200
        assert machine.upload(job_id).status_code == 200
        assert studio.result(job_id) == PICTURE
        machine.hang_up()
    assert "a secret fox" not in caplog.text
    assert "handshake" not in caplog.text


def test_server_that_was_restarted_is_not_noticed(postgres: Cluster, queues: list[JobQueue]) -> None:
    """Connections that broke while nobody used them cost nobody a step."""
    queues[0].add(job(0))
    postgres.stop()
    postgres.start()
    assert queues[0].get("-0") is not None
    assert queues[0].take_next("worker") is not None


def test_server_that_is_away_at_the_start_is_a_clear_mistake(tmp_path: Path) -> None:
    """Host and database are named, the password is not."""
    with pytest.raises(ConfigError) as caught:
        LocalStudio(Places("postgresql://anna:geheim@127.0.0.1:1/farm", Folder(tmp_path)))
    assert "127.0.0.1/farm" in str(caught.value)
    assert "geheim" not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"


def test_server_that_goes_within_a_step_leaves_nothing_of_it(postgres: Cluster, database_url: str) -> None:
    """A step whose connection breaks is told as such, and did not happen."""
    heard: list[None] = []
    database = PostgresDatabase(database_url, lambda: heard.append(None))
    heard.clear()

    def step() -> None:
        with database.writing() as connection:
            connection.exec_driver_sql("INSERT INTO meta VALUES ('a', 'b')")
            postgres.kill()
            postgres.start()
            connection.exec_driver_sql("INSERT INTO meta VALUES ('c', 'd')")

    with pytest.raises(StorageAway):
        step()
    with database.reading() as connection:
        assert connection.exec_driver_sql("SELECT key FROM meta WHERE key IN ('a', 'c')").all() == []
    assert heard == []
    database.close()
