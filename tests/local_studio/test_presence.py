"""Whose a job is when sessions end and begin: over restarts of the studio, and when a worker dials again."""

from __future__ import annotations

from pathlib import Path

from studio_worker.local_studio import Door, Limits, LocalStudio
from studio_worker.local_studio.presence import Presence, Said
from studio_worker.local_studio.pulse import Pulse
from studio_worker.studio import wire
from tests.fakes.machine import CAPABILITIES, PICTURE, WAIT_S, Machine, queue

HASTY = Limits(lease_s=0.4)


def test_restart_on_the_same_file_and_port(tmp_path: Path) -> None:
    """After a restart everything is still there, and a job in hand is still its worker's, at no cost."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        machine = Machine(studio).connect()
        done, in_hand = queue(studio), queue(studio)
        machine.take()
        machine.upload(done)
        machine.hear()
        machine.say("accept", jobId=in_hand)
        machine.beat(job_id=in_hand)
        port = studio.port
    assert machine.closing()[1] == 1012
    with LocalStudio(database, door=Door(port=port)) as studio:
        assert studio.result(done) == PICTURE
        assert not studio.is_online(machine.worker_id)
        assert machine.poll().json()["authToken"] == machine.token
        machine.turn_to(studio).connect().beat(job_id=in_hand)
        job = studio.job(in_hand)
        assert (job.status, job.attempts, job.worker_id) == ("running", 1, machine.worker_id)
        assert machine.upload(in_hand).status_code == 200
        machine.hang_up()


def test_restart_takes_a_picture_whose_worker_has_no_session_yet(tmp_path: Path) -> None:
    """A picture that was finished while the studio was away is taken before its worker has said hello."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio)
        machine.take()
        machine.beat(job_id=job_id)
        port = studio.port
    with LocalStudio(database, door=Door(port=port)) as studio:
        assert machine.upload(job_id).status_code == 200
        assert (studio.job(job_id).status, studio.job(job_id).attempts) == ("done", 1)


def test_restart_offers_again_what_the_worker_does_not_know_of(tmp_path: Path) -> None:
    """A job whose worker comes back without it, for the offer was lost, is offered again at no cost."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio)
        machine.offered()
        port = studio.port
    with LocalStudio(database, door=Door(port=port)) as studio:
        assert machine.turn_to(studio).connect().offered()["jobId"] == job_id
        assert studio.job(job_id).attempts == 1
        machine.hang_up()


def test_restart_offers_again_what_failed_after_it(tmp_path: Path) -> None:
    """A worker that took its job over a restart, and failed, is offered it again: then it says so."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio)
        machine.take()
        machine.beat(job_id=job_id)
        port = studio.port
    with LocalStudio(database, door=Door(port=port)) as studio:
        machine.turn_to(studio).connect().beat(job_id=job_id)
        machine.beat(job_id=job_id)
        assert studio.job(job_id).status == "running"
        assert machine.offered()["jobId"] == job_id
        assert studio.job(job_id).attempts == 1
        machine.beat()
        assert studio.job(job_id).status == "offered"
        machine.hang_up()


def test_restart_lets_go_of_no_job_that_was_offered_after_it(tmp_path: Path) -> None:
    """A picture that comes before its worker's first heartbeat brings the next job, which stays."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        machine = Machine(studio).connect()
        first, second = queue(studio), queue(studio)
        machine.take()
        machine.beat(job_id=first)
        port = studio.port
    with LocalStudio(database, door=Door(port=port)) as studio:
        machine.turn_to(studio).connect()
        assert machine.upload(first).status_code == 200
        assert machine.hear()["claim"]["jobId"] == second
        machine.beat()
        machine.say("accept", jobId=second)
        machine.beat(job_id=second)
        assert (studio.job(second).status, studio.job(second).attempts) == ("running", 1)
        machine.hang_up()


def test_restart_gives_to_others_what_nobody_comes_back_for(tmp_path: Path) -> None:
    """A job whose worker stays away after a restart is queued again, at no cost."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database, limits=HASTY) as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio)
        machine.take()
        machine.beat(job_id=job_id)
    with LocalStudio(database, limits=HASTY) as studio:
        studio.wait_for(lambda: studio.job(job_id).status == "queued", WAIT_S)
        job = studio.job(job_id)
        assert (job.attempts, job.dropped_by) == (0, machine.worker_id)
        assert job.reason == "the studio was restarted"


def test_claim_without_a_session_is_released(tmp_path: Path) -> None:
    """Jobs in hand that an older version left, which knew of no sessions, are queued again after a while."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        job_id = queue(studio)
        studio.queue.take_next("worker")
        studio.queue.accept(job_id, "worker")
    with LocalStudio(database, limits=HASTY) as studio:
        studio.wait_for(lambda: studio.job(job_id).status == "queued", WAIT_S)
        assert (studio.job(job_id).attempts, studio.job(job_id).dropped_by) == (0, "worker")


def test_newcomer_goes_on_with_the_job_that_it_names(studio: LocalStudio, machine: Machine) -> None:
    """A worker whose connection hangs dials again, names its job, and keeps it: nobody makes it twice."""
    job_id = queue(studio)
    machine.take()
    machine.beat(job_id=job_id)
    older = machine.socket
    machine.connect().beat(job_id=job_id)
    job = studio.job(job_id)
    assert (job.status, job.attempts, job.worker_id) == ("running", 1, machine.worker_id)
    newer, machine.socket = machine.socket, older
    assert machine.closing()[1] == 4003
    machine.socket = newer
    machine.beat(job_id=job_id)
    assert studio.job(job_id).status == "running"
    assert machine.upload(job_id).status_code == 200


def test_pulse_gives_workers_the_time_to_come_back(tmp_path: Path) -> None:
    """A process lets go of nothing before it has seen the database for a lease's length without a gap: after
    a start, or when the database was away, no worker could have renewed its lease.
    """
    now = 0.0
    with LocalStudio(tmp_path / "studio.sqlite3") as studio:
        job_id = queue(studio)
        studio.queue.take_next("gone")
        pulse = Pulse(studio.presence, studio.queue, clock=lambda: now)
        for moment in (*range(0, 45, 5), *range(100, 145, 5)):
            now = float(moment)
            pulse.beat()
            assert studio.job(job_id).status == "offered"
        now = 145.0
        pulse.beat()
        assert studio.job(job_id).status == "queued"


def test_worker_whose_end_was_not_written_down_is_not_shown_for_ever(studio: LocalStudio) -> None:
    """A session that ended while the database took nothing is over with its lease."""
    now = 0.0
    presence = Presence(studio.database, "a process", clock=lambda: now)
    capabilities = wire.Capabilities.model_validate(CAPABILITIES)
    number = presence.enter("gone", capabilities).number
    now = 40.0
    presence.renew("gone", number, Said(capabilities), None)
    now = 80.0
    assert "gone" in presence.connected()
    now = 86.0
    assert presence.connected() == {}
