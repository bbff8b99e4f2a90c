"""The session over real WebSocket connections, against a studio played by hand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from studio_worker.errors import DuplicateWorker, ReconnectExhausted, RefusedByStudio
from studio_worker.jobs import ImageTask
from studio_worker.models import ModelSource
from studio_worker.studio.http.api import StudioApi
from tests.fakes.scripted import LIMIT_S, ScriptedStudio
from tests.lab.frames import CLAIM
from tests.lab.session import FAST, Running


@pytest.fixture
def scripted() -> Iterator[ScriptedStudio]:
    with ScriptedStudio() as running:
        yield running


@pytest.fixture
def running(scripted: ScriptedStudio) -> Iterator[Running]:
    session = Running(scripted)
    yield session
    session.stop()
    session.end()


@pytest.mark.usefixtures("running")
def test_session_begins_with_hello_and_says_nothing_before_welcome(scripted: ScriptedStudio) -> None:
    """The upgrade carries bearer and sub-protocol, hello is first, and heartbeats wait for welcome."""
    conversation = scripted.accept()
    assert conversation.path == "/graphics/api/workers/w1/connect"
    assert conversation.authorization == "Bearer token-of-w1"
    assert conversation.subprotocol == "studio-worker-v1"
    hello = conversation.receive()
    assert (hello["type"], hello["authToken"]) == ("hello", "token-of-w1")
    with pytest.raises(TimeoutError):  # several heartbeat intervals long
        conversation._connection.recv(0.3)
    conversation.send(type="welcome", workerId="w1", serverTime="now")
    assert conversation.receive()["type"] == "heartbeat"


def test_session_accepts_an_offer_and_hands_the_job_over(scripted: ScriptedStudio, running: Running) -> None:
    """An offer is accepted, the worker's thread gets the job, and heartbeats name it until it is finished."""
    conversation = scripted.accept()
    conversation.welcome()
    conversation.send(type="offer", claim=CLAIM)
    assert conversation.receive_type("accept") == {"type": "accept", "jobId": "j1"}
    job = running.taken()
    assert job is not None
    assert job.job_id == "j1"
    assert conversation.receive_type("heartbeat")["currentJobId"] == "j1"
    conversation.send(type="offer", claim={**CLAIM, "jobId": "j2"})
    assert conversation.receive_type("reject")["code"] == "busy"
    running.desk.finished(job)
    conversation.send(type="offer", claim={**CLAIM, "jobId": "j2"})
    assert conversation.receive_type("accept")["jobId"] == "j2"


def test_session_reports_a_failure_of_a_job_it_holds(scripted: ScriptedStudio, running: Running) -> None:
    """A failed job is reported with its reason and whether a retry may help."""
    conversation = scripted.accept()
    conversation.welcome()
    conversation.send(type="offer", claim=CLAIM)
    job = running.taken()
    assert job is not None
    running.session.report_failure(job.job_id, "out of memory", retryable=True)
    assert conversation.receive_type("fail") == {
        "type": "fail", "jobId": "j1", "error": "out of memory", "retryable": True,
    }  # fmt: skip


@pytest.mark.usefixtures("running")
def test_session_fails_an_impossible_offer_for_good(scripted: ScriptedStudio) -> None:
    """An offer that no worker could do is accepted and failed at once, and the next one is welcome."""
    conversation = scripted.accept()
    conversation.welcome()
    conversation.send(type="offer", claim={**CLAIM, "task": {"kind": "image"}})
    assert conversation.receive_type("accept")["jobId"] == "j1"
    failure = conversation.receive_type("fail")
    assert not failure["retryable"]
    assert "malformed: prompt" in failure["error"]
    conversation.send(type="offer", claim={**CLAIM, "jobId": "j2"})
    assert conversation.receive_type("accept")["jobId"] == "j2"


def _odd_header(source: ModelSource, task: ImageTask) -> float:
    raise IndexError(f"tuple index out of range, says the library that read {task.prompt!r}")


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"shortfall_bytes": lambda files: int(float("inf"))}, "OverflowError"),
        ({"needed_gb": _odd_header}, "IndexError"),
        ({"is_on_box": lambda files: 1 / 0, "on_demand": False}, "ZeroDivisionError"),
    ],
)
def test_session_outlives_an_offer_that_cannot_be_judged(
    scripted: ScriptedStudio,
    running: Running,
    odd: dict[str, Any],
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever judging an offer meets (an odd model file, a fault of ours), that offer is
    refused, the log has where it happened, and the same session takes the next job.
    """
    conversation = scripted.accept()
    conversation.welcome()
    running.odd = odd
    conversation.send(type="offer", claim=CLAIM)
    refusal = conversation.receive_type("reject")
    assert (refusal["reason"], refusal.get("code")) == (f"the worker cannot tell: {says}", None)
    (told,) = [record for record in caplog.records if record.message == "offer cannot be judged"]
    assert "in judge" in told.__dict__["traceback"]
    assert CLAIM["task"]["prompt"] not in str(told.__dict__)
    running.odd = {}
    conversation.send(type="offer", claim={**CLAIM, "jobId": "j2"})
    assert conversation.receive_type("accept")["jobId"] == "j2"


def test_session_goes_on_while_a_disk_hangs(scripted: ScriptedStudio, running: Running) -> None:
    """A disk that does not answer holds up the answer to an offer, and no heartbeat; offers that come
    meanwhile are answered after it, each by what the ones before it left.
    """
    conversation = scripted.accept()
    conversation.welcome()
    answers = threading.Event()
    running.odd = {"is_poisoned": lambda job_id: not answers.wait(LIMIT_S)}
    conversation.send(type="offer", claim=CLAIM)
    conversation.send(type="offer", claim={**CLAIM, "jobId": "j2"})
    for _ in range(3):
        conversation.receive_type("heartbeat")
    assert running.answers == []
    answers.set()
    assert conversation.receive_type("accept")["jobId"] == "j1"
    assert conversation.receive_type("reject")["jobId"] == "j2"


def test_session_redelivers_a_job_whose_result_waits(scripted: ScriptedStudio, running: Running) -> None:
    """A job offered again while its picture waits in the outbox is accepted and not made again."""
    running.outbox.add("j1")
    conversation = scripted.accept()
    conversation.welcome()
    conversation.send(type="offer", claim=CLAIM)
    assert conversation.receive_type("accept")["jobId"] == "j1"
    assert running.uploads.is_offered_again("j1")
    assert running.desk.current_job_id is None


def test_session_dropped_in_a_job_reconnects_and_takes_the_job_back(
    scripted: ScriptedStudio, running: Running
) -> None:
    """A dropped connection leaves the job in hand; offered again it is accepted, and not run twice."""
    first = scripted.accept()
    first.welcome()
    first.send(type="offer", claim=CLAIM)
    first.receive_type("accept")
    first.drop()
    second = scripted.accept()
    second.welcome()
    assert second.receive_type("heartbeat")["currentJobId"] == "j1"
    second.send(type="offer", claim=CLAIM)
    assert second.receive_type("accept")["jobId"] == "j1"
    assert not running.uploads.is_offered_again("j1")  # there is no picture yet
    job = running.taken()
    assert job is not None
    running.desk.finished(job)
    running.desk.close()
    assert running.taken() is None  # there was one job, not two


def test_session_does_not_report_failures_of_an_earlier_connection(
    scripted: ScriptedStudio, running: Running
) -> None:
    """A job that failed after its connection dropped is not failed over the new one: that is a violation."""
    first = scripted.accept()
    first.welcome()
    first.send(type="offer", claim=CLAIM)
    job = running.taken()
    assert job is not None
    first.drop()
    second = scripted.accept()
    second.welcome()
    second.receive_type("heartbeat")
    running.session.report_failure(job.job_id, "late", retryable=True)
    running.desk.finished(job)
    second.send(type="offer", claim={**CLAIM, "jobId": "j2"})
    frame = second.receive()
    while frame["type"] != "accept":
        assert frame["type"] != "fail"
        frame = second.receive()


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [(4001, RefusedByStudio, 77), (4003, DuplicateWorker, 76), (4004, RefusedByStudio, 77)],
)
def test_session_ends_for_good_on_a_final_close(code: int, kind: type[Any], status: int) -> None:
    """A refused token, a duplicate and a deleted worker end the session with their exit status and a cure."""
    with ScriptedStudio() as scripted:
        running = Running(scripted)
        conversation = scripted.accept()
        conversation.welcome()
        conversation.close(code)
        error = running.end()
    assert isinstance(error, kind)
    assert error.exit_status == status
    assert "register --reset" in str(error)


def test_session_ends_for_good_on_a_final_error_frame() -> None:
    """The error frame alone is enough, whether or not its close code arrives."""
    with ScriptedStudio() as scripted:
        running = Running(scripted)
        conversation = scripted.accept()
        conversation.welcome()
        conversation.send(type="error", code="worker_deleted", message="gone")
        assert isinstance(running.end(), RefusedByStudio)


def test_session_refused_at_the_upgrade_is_final() -> None:
    """HTTP 401 on the upgrade means that the token is refused."""
    with ScriptedStudio(refuse_with=401) as scripted:
        assert isinstance(Running(scripted).end(), RefusedByStudio)


def test_session_gives_up_after_the_configured_attempts() -> None:
    """With a limit, so many failed connections in a row end the session with exit status 75."""
    with ScriptedStudio(refuse_with=503) as scripted:
        error = Running(scripted, attempts=3).end()
    assert isinstance(error, ReconnectExhausted)
    assert error.exit_status == 75
    assert "3 connections" in str(error)
    assert "503" in str(error)


def test_session_gives_up_after_a_limit_that_was_lowered() -> None:
    """A limit that a reload makes lower than what has failed already is met by the next failure."""
    with ScriptedStudio() as scripted:
        running = Running(scripted, attempts=50)
        for _ in range(2):
            scripted.accept().close(1000)  # without a welcome
        third = scripted.accept()  # so that two have failed by now
        running.attempts = 1
        third.close(1000)
        assert isinstance(running.end(), ReconnectExhausted)


@pytest.mark.parametrize("code", [1000, 4002, 1011])
def test_session_reconnects_after_any_other_close(
    scripted: ScriptedStudio, running: Running, code: int
) -> None:
    """Internal errors, violations and restarts of the studio are followed by a new session, and told."""
    first = scripted.accept()
    first.welcome()
    first.receive_type("heartbeat")
    first.close(code)
    scripted.accept().welcome()
    assert running.states[1].startswith("reconnecting the studio ended the session")


def test_session_notices_a_silent_studio(scripted: ScriptedStudio) -> None:
    """A studio that sends no frame for the limit is dead: the connection is dropped and made anew."""
    running = Running(scripted, timings=replace(FAST, dead_peer_s=0.3))
    first = scripted.accept()
    first.welcome()
    scripted.accept().welcome()
    running.stop()
    assert running.end() is None


@pytest.mark.usefixtures("running")
def test_session_survives_rubbish(scripted: ScriptedStudio, caplog: pytest.LogCaptureFixture) -> None:
    """Binary, broken and unknown frames are dropped, each kind logged once; the next offer is answered."""
    conversation = scripted.accept()
    conversation.welcome()
    rubbish = (b"\x00\xff", "{", "[]", '{"type":"fortune"}', '{"type":"offer","claim":3}')
    for message in rubbish * 3:
        conversation.send_raw(message)
    conversation.send(type="offer", claim=CLAIM)
    assert conversation.receive_type("accept")["jobId"] == "j1"
    told = [
        each for each in caplog.records if each.message == "frame dropped" and each.levelname == "WARNING"
    ]
    assert len(told) == len(rubbish)


def test_session_heartbeats_and_answers_while_a_job_is_made(
    scripted: ScriptedStudio, running: Running
) -> None:
    """The worker's thread does nothing for the session from the moment it takes a job until that is done:
    heartbeats name the job, and offers are answered, however long it takes.
    """
    conversation = scripted.accept()
    conversation.welcome()
    conversation.send(type="offer", claim=CLAIM)
    conversation.receive_type("accept")
    heard = threading.Event()

    def make() -> None:
        job = running.taken()
        assert job is not None
        assert heard.wait(LIMIT_S)
        running.desk.finished(job)

    worker = threading.Thread(target=make)
    worker.start()
    try:
        for _ in range(3):
            assert conversation.receive_type("heartbeat")["currentJobId"] == "j1"
        conversation.send(type="offer", claim={**CLAIM, "jobId": "j2"})
        assert conversation.receive_type("reject")["code"] == "busy"
        assert worker.is_alive()
    finally:
        heard.set()
        worker.join(LIMIT_S)
    while "currentJobId" in conversation.receive_type("heartbeat"):
        pass


def test_session_ships_log_lines_with_their_facts(scripted: ScriptedStudio, running: Running) -> None:
    """Log lines reach the studio in batches with level, category and job id, and losses are said."""
    conversation = scripted.accept()
    record = logging.makeLogRecord(
        {"name": "studio_worker.x", "levelno": logging.WARNING, "levelname": "WARNING", "msg": "slow",
         "op": "download", "job_id": "j1", "bytes": 7},
    )  # fmt: skip
    running.shipping.emit(record)
    conversation.welcome()
    entry = next(
        e for e in conversation.receive_type("logBatch")["entries"] if e["message"].startswith("slow")
    )
    assert (entry["level"], entry["category"], entry["jobId"]) == ("warn", "download", "j1")
    assert entry["message"] == "slow bytes=7"
    assert entry["ts"].endswith("Z")
    for _ in range(2500):
        running.shipping.emit(record)
    while True:
        entries = conversation.receive_type("logBatch")["entries"]
        if any("log lines were lost" in e["message"] for e in entries):
            break


def test_session_stopped_sends_what_is_queued_and_closes(scripted: ScriptedStudio) -> None:
    """A stop right after a failure still reports the failure before it closes the connection."""
    running = Running(scripted)
    conversation = scripted.accept()
    conversation.welcome()
    conversation.send(type="offer", claim=CLAIM)
    job = running.taken()
    assert job is not None
    running.desk.close()
    running.session.report_failure(job.job_id, "the worker is stopping", retryable=True)
    running.stop()
    assert conversation.receive_type("fail")["error"] == "the worker is stopping"
    assert running.end() is None


def test_session_closing_its_desk_refuses_offers_as_paused(
    scripted: ScriptedStudio, running: Running
) -> None:
    """A draining worker rejects offers with code paused and says autoEnabled false."""
    conversation = scripted.accept()
    conversation.welcome()
    running.desk.close()
    conversation.send(type="offer", claim=CLAIM)
    assert conversation.receive_type("reject")["code"] == "paused"
    assert conversation.receive_type("heartbeat")["capabilities"]["autoEnabled"] is False


def test_session_follows_no_redirect(scripted: ScriptedStudio) -> None:
    """A redirect of the session is an error: the token in hello goes to the configured studio alone."""
    elsewhere = StudioApi(scripted.url).session_url("w1")
    with ScriptedStudio(refuse_with=307, location=elsewhere) as redirecting:
        error = Running(redirecting, attempts=2).end()
    assert isinstance(error, ReconnectExhausted)
    assert "307" in str(error)


def test_session_that_was_open_counts_as_no_failed_attempt() -> None:
    """A limit of attempts counts connections that failed, not sessions that the studio ended after days."""
    with ScriptedStudio() as scripted:
        running = Running(scripted, attempts=1)
        for _ in range(2):
            conversation = scripted.accept()
            conversation.welcome()
            conversation.receive_type("heartbeat")
            conversation.close(1000)
        scripted.accept().close(1000)  # without a welcome
        assert isinstance(running.end(), ReconnectExhausted)


def test_session_says_at_once_that_it_is_paused(scripted: ScriptedStudio) -> None:
    """Pause and resume are told by a heartbeat of their own; offers between them are rejected as paused."""
    running = Running(scripted, timings=replace(FAST, heartbeat_s=3600.0))
    conversation = scripted.accept()
    running.desk.pause()
    running.session.beat_now()  # before welcome: nothing may be sent
    conversation.welcome()
    assert conversation.receive_type("heartbeat")["capabilities"]["autoEnabled"] is False
    conversation.send(type="offer", claim=CLAIM)
    assert conversation.receive_type("reject")["code"] == "paused"
    running.desk.resume()
    running.session.beat_now()
    assert conversation.receive_type("heartbeat")["capabilities"]["autoEnabled"] is True
    conversation.send(type="offer", claim=CLAIM)
    assert conversation.receive_type("accept")["jobId"] == "j1"
    running.desk.close()
    running.desk.resume()  # a drain is not undone by the operator
    conversation.send(type="offer", claim={**CLAIM, "jobId": "j2"})
    assert conversation.receive_type("reject")["code"] == "paused"
    running.stop()
    running.end()


def test_session_ships_again_what_went_down_with_a_connection(
    scripted: ScriptedStudio, running: Running
) -> None:
    """Log lines sent into a connection that breaks before the studio has confirmed them are sent again."""
    first = scripted.accept()
    first.welcome()
    running.shipping.emit(logging.makeLogRecord({"name": "x", "msg": "precious", "levelno": 20}))
    while first.receive()["type"] != "logBatch":  # heartbeats are not acknowledged
        pass
    first.drop()
    second = scripted.accept()
    second.welcome()
    messages = [entry["message"] for entry in second.receive_type("logBatch")["entries"]]
    assert "precious" in messages
