"""Whom the local studio offers which job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from studio_worker.local_studio import Limits, LocalStudio
from studio_worker.local_studio.rules import JobStatus
from studio_worker.local_studio.storage.tables import turns as turns_table
from studio_worker.local_studio.turns import Patience
from tests.fakes.machine import SOURCE, Machine, queue


def waits_for(studio: LocalStudio, job_id: str, names: dict[str, str] | None = None) -> Any:
    """What the page says of a job that waits."""
    return studio.views.job(studio.job(job_id), names or {}, studio.presence.connected())["waitingFor"]


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


def test_offer_is_made_at_once_where_a_worker_is_idle(studio: LocalStudio) -> None:
    """A job that comes is not left lying until somebody's next heartbeat, nor are those that come with it."""
    machines = [Machine(studio).connect() for _ in range(9)]
    jobs = {queue(studio) for _ in machines}
    assert {machine.hear()["claim"]["jobId"] for machine in machines} == jobs
    for machine in machines:
        machine.hang_up()


def test_offer_is_made_at_once_for_a_job_that_somebody_retries(studio: LocalStudio, machine: Machine) -> None:
    """Whoever asks for another try does not wait for a heartbeat either."""
    job_id = queue(studio)
    machine.say("accept", jobId=machine.hear()["claim"]["jobId"])
    machine.say("fail", jobId=job_id, error="it cannot be made", retryable=False)
    assert machine.hear()["type"] == "failAck"
    studio.retry(job_id)
    assert machine.hear()["claim"]["jobId"] == job_id


def test_offer_that_was_declined_is_not_made_again_at_once(studio: LocalStudio, machine: Machine) -> None:
    """Who is busy is asked again at its next heartbeat, and not over and over."""
    job_id = queue(studio)
    assert machine.hear()["claim"]["jobId"] == job_id
    machine.say("reject", jobId=job_id, reason="busy", code="busy")
    assert machine.hears_nothing()
    assert machine.offered()["jobId"] == job_id


def test_offer_waits_for_a_busy_worker(studio: LocalStudio, machine: Machine) -> None:
    """A heartbeat that names a job in hand is not an idle one."""
    machine.beat(job_id="something else")
    queue(studio)
    assert machine.hears_nothing()
    assert studio.queue.counts()["offered"] == 0
    assert machine.offered()


def test_offer_is_not_made_to_a_paused_worker(studio: LocalStudio, machine: Machine) -> None:
    """While a worker says that it is paused it is left alone, and the job says what it waits for."""
    machine.beat(autoEnabled=False)
    job_id = queue(studio)
    machine.beat(autoEnabled=False)
    assert waits_for(studio, job_id) == "all connected workers are paused"
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
    """A job rejected without a code goes to another worker, and not back to this one; the page says why."""
    job_id, next_id = queue(studio), queue(studio)
    machine.offered()
    machine.say("reject", jobId=job_id, reason="needs 40 GB")
    assert machine.offered()["jobId"] == next_id
    machine.say("accept", jobId=next_id)
    assert machine.upload(next_id).status_code == 200
    assert machine.hears_nothing()
    names = studio.registry.workers.names()
    assert waits_for(studio, job_id, names) == "rejected by box: needs 40 GB"
    assert studio.job(job_id).attempts == 0
    other = Machine(studio, name="bigger").connect()
    assert other.take()["jobId"] == job_id
    other.hang_up()


def test_reject_asks_another_worker_at_once(studio: LocalStudio, machine: Machine) -> None:
    """A job rejected without a code is offered to an idle worker before its next heartbeat."""
    job_id = queue(studio)
    machine.offered()
    other = Machine(studio, name="other").connect()
    machine.say("reject", jobId=job_id, reason="needs 40 GB")
    assert other.hear()["claim"]["jobId"] == job_id
    other.hang_up()


def test_reject_by_everybody_fails_with_all_reasons(tmp_path: Path) -> None:
    """A job that nobody can do comes back to each worker once, then fails; the page tells every reason."""
    limits = Limits(patience=Patience(ask_again_s=0.0))
    with LocalStudio(tmp_path / "studio.sqlite3", limits=limits) as studio:
        small = Machine(studio, name="small").connect()
        job_id = queue(studio)
        assert small.offered()["jobId"] == job_id
        old = Machine(studio, name="old").connect()
        for machine, reason in ((small, "needs 40 GB"), (old, "no such engine")):
            machine.say("reject", jobId=job_id, reason=reason)
            if machine is small:
                assert old.hear()["claim"]["jobId"] == job_id
        assert small.hear()["claim"]["jobId"] == job_id, "nobody else is left, so it comes back"
        small.say("reject", jobId=job_id, reason="needs 40 GB")
        assert old.hear()["claim"]["jobId"] == job_id
        old.say("reject", jobId=job_id, reason="no such engine")
        old.beat()
        job = studio.job(job_id)
        assert (job.status, job.attempts) == ("failed", 0)
        assert job.reason == "no worker can do it (small: needs 40 GB; old: no such engine)"
        small.hang_up()
        old.hang_up()


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


# --- whose turn -------------------------------------------------------------------------------------


def test_turn_goes_by_priority_and_round_robin(studio: LocalStudio, machine: Machine) -> None:
    """The urgent job is first; then people take turns, each with the oldest of its own jobs."""
    machine.beat(job_id="something else")
    pia = [queue(studio, submitter="pia") for _ in range(3)]
    quin = [queue(studio, submitter="quin") for _ in range(2)]
    low, urgent = queue(studio, priority=-1), queue(studio, priority=5)
    turns = [urgent, pia[0], quin[0], pia[1], quin[1], pia[2], low]
    assert [job.job_id for job in studio.jobs(JobStatus.QUEUED)] == turns
    job_id = machine.take()["jobId"]
    made = [job_id]
    while studio.queue.counts()["queued"]:
        assert machine.upload(job_id).status_code == 200
        job_id = machine.hear()["claim"]["jobId"]
        made.append(job_id)
    assert made == turns


def test_who_was_not_served_for_a_thousand_turns_counts_as_new(studio: LocalStudio) -> None:
    """Whoever was served long ago stands behind nobody who came later and was never served."""
    with studio.database.writing() as connection:
        for submitter, number in (("pia", 1), ("others", 1001)):
            connection.execute(insert(turns_table), {"priority": 0, "submitter": submitter, "number": number})
    first, second = queue(studio, submitter="pia"), queue(studio, submitter="quin")
    assert [job.job_id for job in studio.jobs(JobStatus.QUEUED)] == [first, second]
    taken = studio.queue.take_next("a worker")
    assert taken is not None
    assert taken.job_id == first


def test_turns_are_shown_by_pages(studio: LocalStudio) -> None:
    """Wherever a page of the queue begins and ends, it shows that piece of the whole order."""
    for submitter, priority in (("p", 0), ("p", 0), ("q", 0), ("p", 0), ("q", 1), ("p", 1)):
        queue(studio, submitter=submitter, priority=priority)
    turns = studio.queue.listed(JobStatus.QUEUED)
    assert len(turns) == 6
    for first in range(7):
        for most in range(8):
            assert studio.queue.listed(JobStatus.QUEUED, most, first) == turns[first : first + most]


def test_turn_is_remembered_over_a_restart(tmp_path: Path) -> None:
    """Whoever was served before the studio was restarted is not first again after it."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        queue(studio, submitter="pia")
        again, other = queue(studio, submitter="pia"), queue(studio, submitter="quin")
        machine = Machine(studio).connect()
        machine.take()
        machine.hang_up()
    with LocalStudio(database) as studio:
        assert [job.submitter for job in studio.jobs(JobStatus.QUEUED)] == ["quin", "pia", "pia"]
        assert studio.job(other).status == studio.job(again).status == "queued"


def warm_and_cold(studio: LocalStudio) -> tuple[Machine, Machine]:
    """A worker that has made a picture, and one that has not."""
    warm = Machine(studio, name="warm").connect()
    queue(studio)
    assert warm.upload(warm.take()["jobId"]).status_code == 200
    assert warm.hears_nothing()
    return warm, Machine(studio, name="cold").connect()


def test_turn_waits_for_the_worker_with_the_model(tmp_path: Path) -> None:
    """A job is left to the worker that made its model last, for a limited time; then anybody takes it."""
    limits = Limits(patience=Patience(affinity_s=3600.0))
    with LocalStudio(tmp_path / "studio.sqlite3", limits=limits) as studio:
        warm, cold = warm_and_cold(studio)
        job_id = queue(studio)
        cold.beat()
        assert cold.hears_nothing()
        assert warm.offered()["jobId"] == job_id
        warm.hang_up()
        assert cold.offered()["jobId"] == job_id, "a worker that is gone is not waited for"
        cold.hang_up()


def test_turn_does_not_wait_beyond_the_limit(tmp_path: Path) -> None:
    """Once a job's turn has come, another worker loads its model when the limit is over."""
    limits = Limits(patience=Patience(affinity_s=0.0))
    with LocalStudio(tmp_path / "studio.sqlite3", limits=limits) as studio:
        warm, cold = warm_and_cold(studio)  # and warm has something to do
        job_id = queue(studio)  # its turn has come
        assert cold.offered()["jobId"] == job_id
        warm.hang_up()
        cold.hang_up()


@pytest.mark.sqlite
def test_secrets_are_not_in_the_file(tmp_path: Path) -> None:
    """The database holds hashes: neither a worker's token nor its secret can be read from it."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        machine = Machine(studio).connect()
        machine.hang_up()
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert machine.token.encode() not in content
    assert machine.secret.encode() not in content
    assert database.stat().st_mode & 0o077 == 0
