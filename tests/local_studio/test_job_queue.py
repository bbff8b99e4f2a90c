"""Whom the local studio offers which job, and what a restart leaves of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studio_worker.local_studio import Door, LocalStudio
from tests.fakes.machine import PICTURE, SOURCE, Machine, queue

# --- offers -----------------------------------------------------------------------------------------


def test_offer_follows_an_idle_heartbeat_and_holds_everything(studio: LocalStudio, machine: Machine) -> None:
    """An idle heartbeat brings the oldest job, with all that the protocol puts into a claim."""
    first = queue(studio, task={"seed": 5}, vram_gb_estimate=6.5, game_id="g", asset_name="a")
    queue(studio)
    assert machine.offered() == {
        "jobId": first,
        "gameId": "g",
        "assetName": "a",
        "model": "test",
        "vramGbEstimate": 6.5,
        "task": {"kind": "image", "prompt": "a red fox", "width": 64, "height": 64, "seed": 5},
        "modelSource": SOURCE,
    }
    assert studio.job(first).status == "offered"


def test_offer_is_one_at_a_time(studio: LocalStudio, machine: Machine) -> None:
    """A worker with an offer or a job in hand is offered nothing more."""
    queue(studio)
    queue(studio)
    claim = machine.offered()
    machine.beat()
    machine.say("accept", jobId=claim["jobId"])
    machine.beat()
    machine.beat(job_id=claim["jobId"])
    assert studio.queue.counts()["queued"] == 1


def test_offer_waits_for_a_busy_worker(studio: LocalStudio, machine: Machine) -> None:
    """A heartbeat that names a job in hand is not an idle one."""
    queue(studio)
    assert machine.hears_nothing()
    assert studio.queue.counts()["offered"] == 0
    assert machine.offered()


def test_offer_is_not_made_to_a_paused_worker(studio: LocalStudio, machine: Machine) -> None:
    """While a worker says that it is paused it is left alone, and the job says what it waits for."""
    job_id = queue(studio)
    machine.beat(autoEnabled=False)
    machine.beat(autoEnabled=False)
    assert studio.views.job(studio.job(job_id), {})["waitingFor"] == "all connected workers are paused"
    assert machine.offered()["jobId"] == job_id


def test_offer_follows_a_completion_by_itself(studio: LocalStudio, machine: Machine) -> None:
    """After a delivery the next job comes without another heartbeat."""
    first, second = queue(studio), queue(studio)
    machine.take()
    assert machine.upload(first).status_code == 200
    assert machine.hear()["claim"]["jobId"] == second


@pytest.mark.parametrize("code", ["busy", "paused"])
def test_reject_for_now_counts_no_attempt(studio: LocalStudio, machine: Machine, code: str) -> None:
    """A busy or paused worker hands the job back at no cost, until its next idle heartbeat."""
    job_id = queue(studio, max_attempts=1)
    for _ in range(3):
        machine.offered()
        machine.say("reject", jobId=job_id, reason="not now", code=code)
        assert machine.hears_nothing()
        job = studio.job(job_id)
        assert (job.status, job.attempts, job.rejections) == ("queued", 0, {})
    assert machine.offered()["jobId"] == job_id


def test_reject_for_good_sends_the_job_to_somebody_else(studio: LocalStudio, machine: Machine) -> None:
    """A job rejected without a code goes to another worker and never back to this one; the page says why."""
    job_id, next_id = queue(studio), queue(studio)
    machine.offered()
    machine.say("reject", jobId=job_id, reason="needs 40 GB")
    assert machine.offered()["jobId"] == next_id
    machine.say("accept", jobId=next_id)
    assert machine.upload(next_id).status_code == 200
    assert machine.hears_nothing()
    names = studio.registry.workers.names()
    assert studio.views.job(studio.job(job_id), names)["waitingFor"] == "rejected by box: needs 40 GB"
    assert studio.job(job_id).attempts == 0
    other = Machine(studio, name="bigger").connect()
    assert other.take()["jobId"] == job_id
    other.hang_up()


def test_reject_can_be_asked_again_by_a_person(studio: LocalStudio, machine: Machine) -> None:
    """Retrying a rejected job asks the same worker again."""
    job_id = queue(studio)
    machine.offered()
    machine.say("reject", jobId=job_id, reason="disk too small")
    assert machine.hears_nothing()
    studio.retry(job_id)
    assert machine.offered()["jobId"] == job_id


def test_reject_of_a_strange_job_is_dropped(machine: Machine) -> None:
    """A reject for a job the worker does not hold changes nothing and ends nothing."""
    machine.say("reject", jobId="unknown", reason="?")
    machine.beat()


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "accept", "jobId": "unknown"},
        {"type": "fail", "jobId": "unknown", "error": "x", "retryable": True},
        {"type": "completeJson", "jobId": "unknown", "result": {}},
    ],
)
def test_frames_for_a_job_not_held_are_violations(machine: Machine, frame: dict[str, Any]) -> None:
    """Accept, fail and completeJson for a job that is not this worker's end the session with 4002."""
    machine.say(frame.pop("type"), **frame)
    frames, code = machine.closing()
    assert ([said["code"] for said in frames], code) == (["protocol_violation"], 4002)


def test_frames_for_another_workers_job_are_violations(studio: LocalStudio, machine: Machine) -> None:
    """One worker cannot touch what another holds."""
    job_id = queue(studio)
    machine.take()
    other = Machine(studio, name="other").connect()
    other.say("fail", jobId=job_id, error="sabotage", retryable=False)
    assert other.closing()[1] == 4002
    machine.beat(job_id=job_id)
    assert studio.job(job_id).status == "running"


# --- restart ----------------------------------------------------------------------------------------


def test_restart_on_the_same_file_and_port(tmp_path: Path) -> None:
    """After a restart everything is still there, jobs in hand are queued again at no cost, workers return."""
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
        job = studio.job(in_hand)
        assert (job.status, job.attempts) == ("queued", 0)
        assert machine.poll().json()["authToken"] == machine.token
        machine.studio = studio
        assert machine.upload(in_hand).status_code == 200
        machine.connect().hang_up()


def test_restart_after_a_crash_releases_what_was_claimed(tmp_path: Path) -> None:
    """Jobs that were in hand when the studio died are queued again at its next start."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        job_id = queue(studio)
        studio.queue.take_next("worker")
        studio.queue.accept(job_id, "worker")
    with LocalStudio(database) as studio:
        job = studio.job(job_id)
        assert (job.status, job.attempts, job.dropped_by) == ("queued", 0, "worker")


def test_secrets_are_not_in_the_file(tmp_path: Path) -> None:
    """The database holds hashes: neither a worker's token nor its secret can be read from it."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        machine = Machine(studio).connect()
        machine.hang_up()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert machine.token.encode() not in content
    assert machine.secret.encode() not in content
    assert database.stat().st_mode & 0o077 == 0
