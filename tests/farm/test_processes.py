"""Several studio processes on one database, seen by their workers and by people."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import insert

from studio_worker.local_studio import Limits, LocalStudio, Places
from studio_worker.local_studio.pictures import Folder, StorageAway
from studio_worker.local_studio.storage.locks import Lock
from studio_worker.local_studio.storage.tables import last_made
from studio_worker.local_studio.turns import Patience
from tests.fakes.machine import PICTURE, WAIT_S, Machine, queue
from tests.farm.postgres import Cluster

HASTY = Limits(lease_s=1.0)
"""A lease that runs out while a test waits."""


class Studios:
    """Processes of one studio, as far as they know: each has its own connections, sessions and page."""

    def __init__(self, url: str, folder: Path) -> None:
        self._places = Places(url, Folder(folder / "pictures"))

    def open(self, limits: Limits | None = None) -> LocalStudio:
        return LocalStudio(self._places, limits=limits)


@pytest.fixture
def studios(database_url: str, tmp_path: Path) -> Studios:
    return Studios(database_url, tmp_path)


@pytest.fixture
def north(studios: Studios) -> Iterator[LocalStudio]:
    with studios.open() as running:
        yield running


@pytest.fixture
def south(studios: Studios, north: LocalStudio) -> Iterator[LocalStudio]:
    with studios.open() as running:
        yield running


@pytest.fixture
def machine(north: LocalStudio) -> Iterator[Machine]:
    """A worker whose session is with north."""
    worker = Machine(north).connect()
    yield worker
    assert worker.socket is not None
    worker.socket.close()


def await_answer(studio: LocalStudio) -> None:
    """Until the process has its database again; it is tried once a second."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return studio.database.check()
        except StorageAway:
            assert time.monotonic() < deadline


# --- what one process says, all obey ----------------------------------------------------------------


def test_approval_is_obeyed_by_all(north: LocalStudio, south: LocalStudio) -> None:
    """A machine that asked one process, and was approved at another, gets its token from either."""
    machine = Machine(north, approve=False)
    assert [entry.request_id for entry in south.pending()] == [machine.request_id]
    south.approve(machine.request_id)
    machine.fetch_token()
    token = machine.token
    machine.turn_to(south).fetch_token()
    assert machine.token == token
    machine.connect().hang_up()


def test_deletion_ends_the_session_wherever_it_is(
    north: LocalStudio, south: LocalStudio, machine: Machine
) -> None:
    """A worker that is deleted at one process is told so by the other, and its job is free again."""
    job_id = queue(south)
    machine.take()
    south.delete_worker(machine.worker_id)
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["worker_deleted"], 4004)
    south.wait_for(lambda: south.job(job_id).status == "queued", WAIT_S)
    assert not south.is_online(machine.worker_id)


def test_pause_is_seen_by_all(north: LocalStudio, south: LocalStudio, machine: Machine) -> None:
    """The page of every process shows who is connected to any, and what they do."""

    def state() -> str:
        (worker,) = south.workers()
        said: str = south.views.workers([worker], south.presence.connected())[0]["state"]
        return said

    assert state() == "idle"
    machine.beat(autoEnabled=False)
    assert state() == "paused"
    machine.beat("a job")
    assert state() == "working"
    machine.hang_up()
    assert state() == "offline"
    machine.connect()


def test_change_rings_at_every_process(north: LocalStudio, south: LocalStudio) -> None:
    """Whoever waits at one process is woken by what is done at another."""
    seen = south.changes.version
    job_id = queue(north)
    south.wait_for(lambda: south.changes.version > seen, WAIT_S)
    waiting = threading.Thread(target=south.wait_for, args=(lambda: south.queue.get(job_id) is None, WAIT_S))
    waiting.start()
    north.queue.delete(job_id)
    waiting.join()
    assert south.queue.get(job_id) is None


# --- one worker, one session ------------------------------------------------------------------------


def test_second_session_elsewhere_ends_the_first(
    north: LocalStudio, south: LocalStudio, machine: Machine
) -> None:
    """A worker that dials another process keeps its job; its older session ends with duplicate_worker."""
    job_id = queue(north)
    machine.take()
    machine.beat(job_id)
    older = machine.socket
    machine.turn_to(south).connect().beat(job_id)
    newer, machine.socket = machine.socket, older
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["duplicate_worker"], 4003)
    machine.socket = newer
    machine.beat(job_id)
    assert (south.job(job_id).status, south.job(job_id).attempts) == ("running", 1)
    assert machine.upload(job_id).status_code == 200
    assert north.result(job_id) == PICTURE


def test_late_word_of_an_older_session_changes_nothing(
    north: LocalStudio, south: LocalStudio, machine: Machine
) -> None:
    """What still comes over an older session, before its process heard that it is over, is dropped."""
    job_id = queue(north)
    machine.take()
    machine.beat(job_id)
    older = machine.socket
    north.wake.stop()
    machine.turn_to(south).connect().beat(job_id)
    newer, machine.socket = machine.socket, older
    machine.say("fail", jobId=job_id, error="late", retryable=False)
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["duplicate_worker"], 4003)
    machine.socket = newer
    assert (south.job(job_id).status, south.job(job_id).attempts) == ("running", 1)


def test_offer_that_was_lost_on_its_way_costs_no_attempt(
    north: LocalStudio, south: LocalStudio, machine: Machine
) -> None:
    """A worker that comes back without the job it was offered last, which it never accepted, has not tried
    it; one that had accepted it has.
    """
    job_id = queue(north)
    assert machine.offered()["jobId"] == job_id
    lost = [machine.socket]
    assert machine.turn_to(south).connect().offered()["jobId"] == job_id
    assert south.job(job_id).attempts == 1
    machine.say("accept", jobId=job_id)
    machine.beat(job_id)
    lost.append(machine.socket)
    assert machine.turn_to(north).connect().offered()["jobId"] == job_id
    assert south.job(job_id).attempts == 2
    for socket in lost:
        assert socket is not None
        socket.close()


# --- offers -----------------------------------------------------------------------------------------


def test_upload_at_another_process_brings_the_next_offer(
    north: LocalStudio, south: LocalStudio, machine: Machine
) -> None:
    """A picture may arrive at any process; the next offer comes over the session by itself."""
    first, second = queue(north), queue(north)
    machine.take()
    machine.beat(first)
    machine.turn_to(south)
    assert machine.upload(first).status_code == 200
    assert machine.hear()["claim"]["jobId"] == second


def test_job_that_comes_is_offered_at_once_wherever_a_worker_is_idle(
    north: LocalStudio, south: LocalStudio, machine: Machine
) -> None:
    """A job that comes to one process is not left lying until the heartbeat of another one's worker."""
    machine.turn_to(south)
    job_id = queue(south)
    assert machine.hear()["claim"]["jobId"] == job_id


def test_rejected_job_is_offered_to_a_worker_of_another_process(
    north: LocalStudio, south: LocalStudio, machine: Machine
) -> None:
    """A job that one worker will not do goes at once to an idle one, whichever process has that."""
    job_id = queue(north)
    assert machine.offered()["jobId"] == job_id
    other = Machine(south, name="other").connect()
    machine.say("reject", jobId=job_id, reason="needs 40 GB")
    assert other.hear()["claim"]["jobId"] == job_id
    other.hang_up()


def test_job_fails_where_the_workers_of_all_processes_have_rejected_it(studios: Studios) -> None:
    """A job that nobody can do goes from one to the other, twice, and fails with the reasons of all."""
    at_once = Limits(patience=Patience(ask_again_s=0.0))
    with studios.open(at_once) as north, studios.open(at_once) as south:
        box = Machine(north).connect()
        job_id = queue(north)
        assert box.offered()["jobId"] == job_id
        other = Machine(south, name="other").connect()
        box.say("reject", jobId=job_id, reason="needs 40 GB")
        for asked in (other, box):
            assert asked.hear()["claim"]["jobId"] == job_id
            asked.say("reject", jobId=job_id, reason=f"{asked.capabilities['machineName']} cannot")
        assert other.hear()["claim"]["jobId"] == job_id
        other.say("reject", jobId=job_id, reason="never")
        south.wait_for(lambda: south.job(job_id).status == "failed", WAIT_S)
        assert north.job(job_id).reason == "no worker can do it (box: box cannot; other: never)"
        box.hang_up()
        other.hang_up()


def test_worker_that_asks_in_vain_holds_up_nobody(
    north: LocalStudio, machine: Machine, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all that waits is left to workers that have its model loaded, the others ask without a lock: they
    neither wait for whoever is being given a job, nor let anybody wait.
    """
    keeper = Machine(north, name="keeper").connect()
    keeper.beat("something else")
    machine.beat("something else")
    with north.database.writing() as connection:
        connection.execute(insert(last_made), {"worker_id": keeper.worker_id, "model": "test"})
    job_id = queue(north)
    for _ in range(2):  # the first notes whose turn it was; the second is answered after that
        machine.beat()
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (int(Lock.TURNS),))
        for _ in range(3):
            machine.beat()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    keeper.beat()
    assert keeper.hear()["claim"]["jobId"] == job_id
    keeper.hang_up()


# --- processes that end -----------------------------------------------------------------------------


def test_job_in_hand_goes_on_when_its_process_is_stopped(studios: Studios, south: LocalStudio) -> None:
    """A process that is stopped hands its sessions over: workers go on at another, no attempt is counted."""
    leaving = studios.open().start()
    machine = Machine(leaving).connect()
    job_id = queue(south)
    machine.take()
    machine.beat(job_id)
    leaving.stop()
    assert machine.closing()[1] == 1012
    assert (south.job(job_id).status, south.is_online(machine.worker_id)) == ("running", False)
    machine.turn_to(south).connect().beat(job_id)
    assert (south.job(job_id).status, south.job(job_id).attempts) == ("running", 1)
    assert machine.upload(job_id).status_code == 200
    machine.hang_up()


def test_claim_is_released_once(studios: Studios) -> None:
    """Of all processes that see a lost claim at the same moment one releases it, and it costs nothing."""
    leaving = studios.open(HASTY).start()
    machine = Machine(leaving).connect()
    job_id = queue(leaving)
    machine.take()
    machine.beat(job_id)
    leaving.stop()
    processes = [studios.open(HASTY) for _ in range(4)]
    released: list[object] = []
    ready = threading.Barrier(len(processes))

    def release(studio: LocalStudio) -> None:
        while job_id not in studio.presence.lost():
            pass
        ready.wait()
        released.append(studio.queue.let_go(job_id, studio.presence.loss))

    threads = [threading.Thread(target=release, args=(studio,)) for studio in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each is None for each in released].count(False) == 1
    job = processes[0].job(job_id)
    assert (job.status, job.attempts, job.dropped_by) == ("queued", 0, machine.worker_id)
    assert job.reason == "the studio was restarted"
    for studio in processes:
        studio.stop()


def test_database_that_restarts_costs_no_claim(
    postgres: Cluster, north: LocalStudio, machine: Machine
) -> None:
    """While the database is away heartbeats are acknowledged; afterwards the job is still its worker's."""
    job_id = queue(north)
    machine.take()
    machine.beat(job_id)
    postgres.stop()
    machine.beat(job_id)
    postgres.start()
    await_answer(north)
    machine.beat(job_id)
    assert (north.job(job_id).status, north.job(job_id).attempts) == ("running", 1)
    assert machine.upload(job_id).status_code == 200
