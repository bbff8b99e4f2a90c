"""The local studio\'s side of a session, from hello to its end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from studio_worker.local_studio import Limits, LocalStudio
from studio_worker.local_studio.pictures import StorageAway
from tests.fakes.machine import CAPABILITIES, WAIT_S, Machine, queue


def test_session_welcomes_by_name_and_time(anywhere: LocalStudio) -> None:
    """A hello is answered with welcome, under the protocol's own sub-protocol."""
    machine = Machine(anywhere)
    machine.socket = machine.dial()
    assert machine.socket.subprotocol == "studio-worker-v1"
    machine.say("hello", authToken=machine.token, capabilities=CAPABILITIES)
    welcome = machine.hear()
    assert (welcome["type"], welcome["workerId"]) == ("welcome", machine.worker_id)
    assert welcome["serverTime"].endswith("Z")
    assert anywhere.is_online(machine.worker_id)
    machine.hang_up()


@pytest.mark.parametrize("token", ["", "wrong", "0" * 64])
def test_session_wrong_token_is_401_on_the_upgrade(anywhere: LocalStudio, token: str) -> None:
    """Without the worker's token there is no session, and the upgrade says 401."""
    machine = Machine(anywhere)
    with pytest.raises(InvalidStatus) as refused:
        machine.dial(token=token)
    assert refused.value.response.status_code == 401


def test_session_without_subprotocol_is_refused(anywhere: LocalStudio) -> None:
    """The sub-protocol is required."""
    machine = Machine(anywhere)
    for subprotocol in (None, "studio-worker-v2"):
        with pytest.raises(InvalidStatus) as refused:
            machine.dial(subprotocol=subprotocol)
        assert refused.value.response.status_code == 400


def test_session_that_is_refused_is_no_error_of_the_studio(
    anywhere: LocalStudio, caplog: pytest.LogCaptureFixture
) -> None:
    """An upgrade that is answered with a status leaves no line of a fault in the operator's log."""
    machine = Machine(anywhere)
    for wrong in ({"token": "wrong"}, {"subprotocol": None}):
        with pytest.raises(InvalidStatus) as refused:
            machine.dial(**wrong)  # type: ignore[arg-type]
        assert refused.value.response.body
    assert machine.upload("unknown").status_code in {404, 409}  # by when the others are over
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_session_wrong_token_in_hello_is_auth_failed(anywhere: LocalStudio) -> None:
    """A hello with another token than the upgrade's ends with auth_failed and 4001."""
    machine = Machine(anywhere)
    machine.socket = machine.dial()
    machine.say("hello", authToken="wrong", capabilities=CAPABILITIES)
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["auth_failed"], 4001)


@pytest.mark.parametrize(
    "first",
    [
        {"type": "heartbeat", "capabilities": CAPABILITIES},
        {"type": "accept", "jobId": "x"},
        {"type": "hello"},
        {"type": "unheard of"},
        [],
    ],
)
def test_session_must_begin_with_hello(anywhere: LocalStudio, first: Any) -> None:
    """Anything but a hello before welcome is a protocol_violation."""
    machine = Machine(anywhere)
    machine.socket = machine.dial()
    machine.socket.send(json.dumps(first))
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["protocol_violation"], 4002)


def test_session_second_hello_is_a_violation(machine: Machine) -> None:
    """Hello comes once."""
    machine.say("hello", authToken=machine.token, capabilities=CAPABILITIES)
    frames, code = machine.closing()
    assert (frames[0]["code"], code) == ("protocol_violation", 4002)


def test_session_accept_may_come_after_the_picture(studio: LocalStudio, machine: Machine) -> None:
    """A picture that waited in the outbox goes out on a connection of its own, and may be there first."""
    job_id = queue(studio)
    assert machine.offered()["jobId"] == job_id
    assert machine.upload(job_id).status_code == 200
    machine.say("accept", jobId=job_id)
    machine.beat()
    assert studio.job(job_id).completions == 1


def test_session_silent_newcomer_is_sent_away(tmp_path: Path) -> None:
    """A connection without a hello does not stay open for ever."""
    with LocalStudio(tmp_path / "studio.sqlite3", limits=Limits(hello_timeout_s=0.2)) as studio:
        machine = Machine(studio)
        machine.socket = machine.dial()
        frames, code = machine.closing()
        assert (frames[0]["code"], code) == ("protocol_violation", 4002)


def test_session_without_heartbeat_is_closed_and_its_job_released(tmp_path: Path) -> None:
    """A worker whose heartbeats stop loses its session and its job, whatever else it still sends."""
    with LocalStudio(tmp_path / "studio.sqlite3", limits=Limits(heartbeat_timeout_s=2.0)) as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio)
        machine.take()
        machine.say("logBatch", entries=[])
        assert machine.closing() == ([], 3008)
        studio.wait_for(lambda: studio.job(job_id).status == "queued", WAIT_S)
        assert studio.job(job_id).attempts == 1


def test_session_newcomer_replaces_the_older_one(studio: LocalStudio, machine: Machine) -> None:
    """A second session of the same worker ends the first with duplicate_worker, and its job is released."""
    job_id = queue(studio)
    machine.take()
    older = machine.socket
    machine.connect()
    newer, machine.socket = machine.socket, older
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["duplicate_worker"], 4003)
    machine.socket = newer
    assert studio.is_online(machine.worker_id)
    assert machine.take()["jobId"] == job_id
    assert studio.job(job_id).attempts == 2


def test_session_of_deleted_worker_ends(studio: LocalStudio, machine: Machine) -> None:
    """Deleting a worker ends its session with worker_deleted, now and later, and frees its job."""
    job_id = queue(studio)
    machine.take()
    studio.delete_worker(machine.worker_id)
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["worker_deleted"], 4004)
    studio.wait_for(lambda: studio.job(job_id).status == "queued", WAIT_S)
    machine.socket = machine.dial()
    machine.say("hello", authToken=machine.token, capabilities=CAPABILITIES)
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["worker_deleted"], 4004)
    assert machine.upload(job_id).status_code == 401
    machine.register()
    assert studio.approve(machine.request_id) != machine.worker_id
    machine.fetch_token()
    machine.connect()


def test_session_unreadable_frames_are_dropped(machine: Machine) -> None:
    """After welcome a binary, broken or unknown frame is dropped, and the session goes on."""
    assert machine.socket is not None
    machine.socket.send(b"\x00\x01")
    machine.socket.send("{")
    machine.socket.send('{"type": "readyForMore"}')
    machine.socket.send('{"type": "heartbeat", "capabilities": 5}')
    machine.say("heartbeat", capabilities=CAPABILITIES | {"vramTotalGb": float("inf")})
    machine.beat()


def test_session_own_mistake_is_internal_error(
    studio: LocalStudio, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the studio itself fails, the worker hears internal_error and 1000, and may come back."""

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(studio.shelf, "add_logs", broken)
    machine.say("logBatch", entries=[])
    frames, code = machine.closing()
    assert ([frame["code"] for frame in frames], code) == (["internal_error"], 1000)
    machine.connect()


def test_session_logs_are_kept_within_bounds(
    studio: LocalStudio, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shipped log lines are kept, the newest only, and long ones cut."""
    monkeypatch.setattr("studio_worker.local_studio.shelf.MAX_LOG_LINES", 10)
    entries = [
        {"ts": "2026-01-01T00:00:00Z", "level": "info", "category": "engine", "message": f"{n} " + "x" * 9000}
        for n in range(30)
    ]
    machine.say("logBatch", entries=entries)
    machine.beat()
    lines = studio.logs(machine.worker_id)
    assert [line.message.split()[0] for line in lines] == [str(n) for n in range(20, 30)]
    assert all(len(line.message) <= 4000 for line in lines)
    assert studio.logs("somebody else") == []


def test_session_that_says_nothing_new_disturbs_nobody(anywhere: LocalStudio) -> None:
    """Heartbeats come every few seconds of each worker: pages hear of those that say something new, and each
    renews what is shown of the worker's last sign of life.
    """
    machine = Machine(anywhere).connect()
    machine.beat(job_id="a")
    seen, before = anywhere.changes.version, anywhere.presence.connected()[machine.worker_id]
    machine.beat(job_id="a")
    machine.beat(job_id="a")
    assert anywhere.changes.version == seen
    now = anywhere.presence.connected()[machine.worker_id]
    assert (now.current_job_id, now.is_paused) == ("a", False)
    assert now.heartbeat_at > before.heartbeat_at
    machine.beat(job_id="a", autoEnabled=False)
    assert anywhere.changes.version > seen
    seen = anywhere.changes.version
    machine.beat(job_id="b", autoEnabled=False)
    assert anywhere.changes.version > seen
    machine.hang_up()
    (worker,) = (each for each in anywhere.workers() if each.worker_id == machine.worker_id)
    assert (worker.last_seen_at or 0.0) > now.heartbeat_at


@pytest.mark.parametrize("step", ["take_next", "decline"])
@pytest.mark.parametrize("is_written", [True, False])
def test_worker_whose_step_got_no_answer_is_not_left_idle(
    studio: LocalStudio, machine: Machine, monkeypatch: pytest.MonkeyPatch, step: str, *, is_written: bool
) -> None:
    """An offer, or its rejection, that the database did not answer in time: whether it was written or not,
    the worker's next idle heartbeats bring the job again, and no attempt is counted.
    """
    do = getattr(studio.queue, step)

    def in_doubt(*given: Any, **named: Any) -> None:
        if is_written:
            do(*given, **named)
        monkeypatch.setattr(studio.queue, step, do)
        raise StorageAway("the server has said nothing for 4 s")

    machine.beat("something else")
    job_id = queue(studio)
    if step == "decline":
        assert machine.offered()["jobId"] == job_id
        monkeypatch.setattr(studio.queue, step, in_doubt)
        machine.say("reject", jobId=job_id, reason="busy", code="busy")
    else:
        monkeypatch.setattr(studio.queue, step, in_doubt)
        machine.beat()
    machine.beat()
    assert machine.hear()["claim"]["jobId"] == job_id
    assert studio.job(job_id).attempts == 1


def test_offer_on_its_way_is_not_taken_back(
    studio: LocalStudio, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step without an answer, too, an idle heartbeat that crosses an offer leaves that alone."""
    do = studio.queue.take_next

    def in_doubt(*given: Any, **named: Any) -> None:
        monkeypatch.setattr(studio.queue, "take_next", do)
        raise StorageAway("the server has said nothing for 4 s")

    machine.beat("something else")
    job_id = queue(studio)
    monkeypatch.setattr(studio.queue, "take_next", in_doubt)
    for _ in range(4):  # the second brings the offer; the others were sent before it came
        machine.beat()
    assert machine.hear()["claim"]["jobId"] == job_id
    machine.say("accept", jobId=job_id)
    machine.beat(job_id)
    assert studio.job(job_id).status == "running"
    assert machine.upload(job_id).status_code == 200


def test_rejection_while_the_database_is_away_leaves_no_worker_idle(
    studio: LocalStudio, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rejection of which nothing at all can be asked or written is made good by the next idle heartbeat."""
    check = studio.presence.check

    def away(*_given: Any) -> None:
        monkeypatch.setattr(studio.presence, "check", check)
        raise StorageAway("the database did not answer a moment ago")

    job_id = queue(studio)
    assert machine.offered()["jobId"] == job_id
    monkeypatch.setattr(studio.presence, "check", away)
    machine.say("reject", jobId=job_id, reason="busy", code="busy")
    machine.beat()
    machine.beat()
    assert machine.hear()["claim"]["jobId"] == job_id


def test_failed_job_whose_next_offer_got_no_answer_is_offered_again(
    studio: LocalStudio, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second offer of a job that the database did not answer in time is no other than a first one."""
    do = studio.queue.take_next

    def in_doubt(*given: Any, **named: Any) -> None:
        if do(*given, **named) is not None:
            monkeypatch.setattr(studio.queue, "take_next", do)
        raise StorageAway("the server has said nothing for 4 s")

    job_id = queue(studio)
    machine.take()
    monkeypatch.setattr(studio.queue, "take_next", in_doubt)
    machine.say("fail", jobId=job_id, error="out of memory", retryable=True)
    assert machine.hear() == {"type": "failAck", "jobId": job_id}
    for _ in range(3):
        machine.beat()
    assert machine.hear()["claim"]["jobId"] == job_id
