"""The local studio as a worker meets it: registration, sessions, offers, delivery."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from websockets.exceptions import InvalidStatus

from studio_worker.local_studio import Door, Limits, LocalStudio
from tests.fakes.machine import CAPABILITIES, PICTURE, SOURCE, WAIT_S, Machine, queue


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    with LocalStudio(tmp_path / "studio.sqlite3") as running:
        yield running


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStudio]:
    """One studio for all tests that leave no jobs behind."""
    with LocalStudio(tmp_path_factory.mktemp("studio") / "studio.sqlite3") as running:
        yield running


@pytest.fixture
def machine(studio: LocalStudio) -> Iterator[Machine]:
    worker = Machine(studio).connect()
    yield worker
    assert worker.socket is not None
    worker.socket.close()


# --- registration -----------------------------------------------------------------------------------


def test_registration_waits_for_approval(anywhere: LocalStudio) -> None:
    """A machine that asks is pending until a person approves it, and then gets an id and a token."""
    machine = Machine(anywhere, approve=False)
    assert machine.poll().json() == {"status": "pending"}
    assert machine.request_id in [entry.request_id for entry in anywhere.pending()]
    worker_id = anywhere.approve(machine.request_id)
    answer = machine.poll().json()
    assert (answer["status"], answer["workerId"]) == ("approved", worker_id)
    assert len(answer["authToken"]) == 64
    assert machine.request_id not in [entry.request_id for entry in anywhere.pending()]


def test_registration_same_machine_keeps_its_request(anywhere: LocalStudio) -> None:
    """Asking again with the same installId gives the same requestId."""
    machine = Machine(anywhere, approve=False)
    before = machine.request_id
    machine.register(new_secret=False)
    assert machine.request_id == before


def test_registration_lost_secret_starts_over(anywhere: LocalStudio) -> None:
    """A machine that lost its secret while pending may ask with a new one; the old one is refused then."""
    machine = Machine(anywhere, approve=False)
    before, old_secret = machine.request_id, machine.secret
    machine.register()
    assert machine.request_id == before
    assert machine.poll().json() == {"status": "pending"}
    assert machine.poll(secret=old_secret).status_code == 401


def test_registration_poll_refuses_wrong_secret_and_unknown_request(anywhere: LocalStudio) -> None:
    """Only the secret whose hash was sent gets an answer; an unknown request is not found."""
    machine = Machine(anywhere, approve=False)
    assert machine.poll(secret="0" * 64).status_code == 401
    assert machine.poll(request_id="nope").status_code == 404


def test_registration_poll_after_approval_is_idempotent(anywhere: LocalStudio) -> None:
    """Polling again after approval gives the same worker id and token."""
    machine = Machine(anywhere)
    assert machine.poll().json() == machine.poll().json()
    assert machine.poll().json()["authToken"] == machine.token


def test_registration_rejected_says_why(anywhere: LocalStudio) -> None:
    """A rejected machine is told the reason, where one was given."""
    with_reason, without = Machine(anywhere, approve=False), Machine(anywhere, approve=False)
    anywhere.reject(with_reason.request_id, "not ours")
    anywhere.reject(without.request_id)
    assert with_reason.poll().json() == {"status": "rejected", "reason": "not ours"}
    assert without.poll().json() == {"status": "rejected"}


def test_registration_again_replaces_the_token(studio: LocalStudio, machine: Machine) -> None:
    """A known machine that asks with a new secret stays the same worker, with a new token only."""
    old_token, old_request, old_secret = machine.token, machine.request_id, machine.secret
    machine.register()
    assert machine.request_id != old_request
    assert machine.poll().json() == {"status": "pending"}
    assert studio.approve(machine.request_id) == machine.worker_id
    frames, code = machine.closing()
    assert (frames[-1]["code"], code) == ("auth_failed", 4001)
    machine.fetch_token()
    assert machine.token != old_token
    assert machine.poll(secret=old_secret, request_id=old_request).status_code == 404
    with pytest.raises(InvalidStatus) as refused:
        machine.dial(token=old_token)
    assert refused.value.response.status_code == 401
    machine.connect()


def test_registration_auto_approve_needs_no_person(tmp_path: Path) -> None:
    """With auto_approve a machine is let in at once."""
    with LocalStudio(tmp_path / "studio.sqlite3", auto_approve=True) as studio:
        machine = Machine(studio, approve=False)
        assert machine.poll().json()["status"] == "approved"
        machine.register(new_secret=False)
        assert machine.poll().json()["status"] == "approved"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[1]",
        b'{"installId": "x"}',
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 50_000,
        b'{"installId": "\\ud800"}',
    ],
)
def test_registration_bad_body_is_a_clear_400(anywhere: LocalStudio, body: bytes) -> None:
    """Whatever is sent instead of a registration gets a sentence, not a traceback."""
    url = f"{anywhere.base_url}/graphics/api/workers/register-request"
    answer = requests.post(url, data=body, timeout=WAIT_S)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"installId": ""},
        {"installId": "x" * 201},
        {"registrationSecretHash": "abc"},
        {"capabilities": CAPABILITIES | {"vramTotalGb": "lots"}},
    ],
)
def test_registration_bad_field_is_named(anywhere: LocalStudio, change: dict[str, Any]) -> None:
    """A registration with one wrong field is told which."""
    body = {
        "installId": "x",
        "registrationSecretHash": "0" * 64,
        "capabilities": CAPABILITIES,
        "userAgent": "u",
    } | change
    url = f"{anywhere.base_url}/graphics/api/workers/register-request"
    answer = requests.post(url, json=body, timeout=WAIT_S)
    assert answer.status_code == 400
    assert next(iter(change)) in answer.json()["error"]


def test_registration_queue_is_bounded(studio: LocalStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """When too many machines wait for a decision, the next is asked to come back later."""
    monkeypatch.setattr("studio_worker.local_studio.registry.MAX_PENDING", 1)
    Machine(studio, approve=False)
    body = {
        "installId": "another",
        "registrationSecretHash": "0" * 64,
        "capabilities": CAPABILITIES,
        "userAgent": "u",
    }
    url = f"{studio.base_url}/graphics/api/workers/register-request"
    answer = requests.post(url, json=body, timeout=WAIT_S)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "30")


# --- the session's beginning and end ----------------------------------------------------------------


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


def test_session_silent_newcomer_is_sent_away(tmp_path: Path) -> None:
    """A connection without a hello does not stay open for ever."""
    with LocalStudio(tmp_path / "studio.sqlite3", limits=Limits(hello_timeout_s=0.2)) as studio:
        machine = Machine(studio)
        machine.socket = machine.dial()
        frames, code = machine.closing()
        assert (frames[0]["code"], code) == ("protocol_violation", 4002)


def test_session_without_heartbeat_is_closed_and_its_job_released(tmp_path: Path) -> None:
    """A worker whose heartbeats stop loses its session and its job, whatever else it still sends."""
    with LocalStudio(tmp_path / "studio.sqlite3", limits=Limits(heartbeat_timeout_s=0.4)) as studio:
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


# --- failing, dropping, delivering ------------------------------------------------------------------


def test_fail_retryable_tries_until_attempts_are_used_up(studio: LocalStudio, machine: Machine) -> None:
    """A retryable failure queues the job again, until its attempts are used up; then its reason stands."""
    job_id = queue(studio, max_attempts=2)
    for attempt, status in ((1, "queued"), (2, "failed")):
        assert machine.take()["jobId"] == job_id
        machine.say("fail", jobId=job_id, error=f"out of memory {attempt}", retryable=True)
        assert machine.hear() == {"type": "failAck", "jobId": job_id}
        job = studio.job(job_id)
        assert (job.status, job.attempts, job.reason) == (status, attempt, f"out of memory {attempt}")
    machine.beat()


def test_fail_for_good_is_final(studio: LocalStudio, machine: Machine) -> None:
    """A failure that is not retryable ends the job, whatever attempts are left; a person may retry."""
    job_id = queue(studio)
    machine.take()
    machine.say("fail", jobId=job_id, error="unknown engine " + "x" * 9000, retryable=False)
    assert machine.hear()["type"] == "failAck"
    reason = studio.job(job_id).reason or ""
    assert (studio.job(job_id).status, reason[:15], len(reason)) == ("failed", "unknown engine ", 2000)
    studio.retry(job_id)
    assert (studio.job(job_id).status, studio.job(job_id).attempts) == ("queued", 0)
    assert machine.offered()["jobId"] == job_id


def test_drop_releases_the_job_to_others(studio: LocalStudio, machine: Machine) -> None:
    """When a connection ends, its job may go to somebody else at once, and the attempt counts."""
    job_id = queue(studio)
    machine.take()
    machine.hang_up()
    assert (studio.job(job_id).status, studio.job(job_id).attempts) == ("queued", 1)
    other = Machine(studio, name="other").connect()
    assert other.take()["jobId"] == job_id
    assert machine.upload(job_id).status_code == 409
    assert other.upload(job_id).status_code == 200
    assert (studio.job(job_id).completions, studio.job(job_id).refused_uploads) == (1, 1)
    other.hang_up()


def test_drop_uses_attempts_up(studio: LocalStudio) -> None:
    """A job that takes every worker's connection down is not offered for ever."""
    job_id = queue(studio, max_attempts=2)
    machine = Machine(studio)
    for _ in range(2):
        machine.connect().take()
        machine.hang_up()
    assert studio.job(job_id).status == "failed"
    assert studio.job(job_id).reason == "the connection to the worker was lost"
    assert machine.upload(job_id).status_code == 200, "no worker ever said that it cannot be done"


def test_drop_does_not_lose_a_finished_picture(studio: LocalStudio, machine: Machine) -> None:
    """A picture finished after the connection dropped is taken, while nobody else had the job since."""
    job_id = queue(studio)
    machine.take()
    machine.hang_up()
    assert machine.upload(job_id).status_code == 200
    assert studio.job(job_id).status == "done"


def test_drop_and_offered_again_to_the_same_worker(studio: LocalStudio, machine: Machine) -> None:
    """A worker that is offered its own dropped job again may deliver what it has, even before accepting."""
    job_id = queue(studio)
    machine.take()
    machine.hang_up()
    machine.connect()
    assert machine.offered()["jobId"] == job_id
    assert machine.upload(job_id).status_code == 200


def test_upload_is_kept_with_all_facts(studio: LocalStudio, machine: Machine) -> None:
    """A delivered picture is kept with its full prompt, meta data, worker and seconds."""
    job_id = queue(studio)
    machine.take()
    prompt = "a red fox, " * 500
    answer = machine.upload(job_id, prompt=prompt, ext="png", generationMeta='{"seed": 7, "steps": 8}')
    assert answer.status_code == 200
    result = studio.queue.result(job_id)
    assert result is not None
    assert (result.prompt, result.ext, result.worker_id) == (prompt, "png", machine.worker_id)
    assert (result.generation_meta, result.size_bytes) == ({"seed": 7, "steps": 8}, len(PICTURE))
    assert 0 <= result.seconds < WAIT_S
    assert studio.result(job_id) == PICTURE


def test_upload_counts_once(studio: LocalStudio, machine: Machine) -> None:
    """A job is completed exactly once: a second delivery is refused with 409 and changes nothing."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    assert machine.upload(job_id, b"another").status_code == 409
    assert studio.result(job_id) == PICTURE
    assert (studio.job(job_id).completions, studio.job(job_id).refused_uploads) == (1, 1)


def test_upload_race_completes_once(studio: LocalStudio, machine: Machine) -> None:
    """Of many deliveries of one job at the same moment exactly one is taken."""
    job_id = queue(studio)
    machine.take()
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(machine.upload(job_id).status_code)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 409, 409, 409, 409, 409]
    assert studio.job(job_id).completions == 1


def test_upload_refusals(studio: LocalStudio, machine: Machine) -> None:
    """Wrong token is 401, unknown job 404, a job that was never this worker's 409, a failed one 409."""
    job_id = queue(studio)
    assert machine.upload(job_id, token="wrong").status_code == 401
    assert machine.upload("unknown").status_code == 404
    assert machine.upload(job_id).status_code == 409
    machine.take()
    machine.say("fail", jobId=job_id, error="x", retryable=False)
    machine.hear()
    assert machine.upload(job_id).status_code == 409


def test_upload_refusal_is_heard_after_a_large_body(studio: LocalStudio, machine: Machine) -> None:
    """A refused delivery reads the status, however large its body was; it never sees a broken pipe."""
    large = b"x" * (8 << 20)
    assert machine.upload("unknown", large).status_code == 404
    assert machine.upload(queue(studio), large, token="wrong").status_code == 401


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ext": "../../x"}, "ext"),
        ({"ext": ""}, "ext"),
        ({"ext": "WEBP"}, "ext"),
        ({"ext": "x" * 9}, "ext"),
        ({"generationMeta": "{"}, "generationMeta"),
        ({"generationMeta": '{"a": NaN}'}, "generationMeta"),
    ],
)
def test_upload_bad_field_is_named(
    studio: LocalStudio, machine: Machine, fields: dict[str, str], named: str
) -> None:
    """A delivery with a wrong field is 400, says which, and leaves the job where it is."""
    job_id = queue(studio)
    machine.take()
    answer = machine.upload(job_id, **fields)
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert studio.job(job_id).status == "running"


def test_upload_needs_a_file(studio: LocalStudio, machine: Machine) -> None:
    """A delivery without a file, with an empty one, or that is no form at all is 400."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id, b"").status_code == 400
    url = f"{machine.api}/workers/{machine.worker_id}/jobs/{job_id}/complete"
    headers = {"Authorization": f"Bearer {machine.token}"}
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    for body, more in ((b"bytes", {}), (b"not a part", multipart), (b"", multipart)):
        answer = requests.post(url, data=body, headers=headers | more, timeout=WAIT_S)
        assert answer.status_code == 400
        assert answer.json()["error"]
    no_file = {"prompt": (None, "p"), "ext": (None, "webp"), "image": (None, "text")}
    assert requests.post(url, files=no_file, headers=headers, timeout=WAIT_S).status_code == 400  # type: ignore[arg-type]
    assert studio.job(job_id).status == "running"


def test_upload_larger_than_the_limit_is_413(
    studio: LocalStudio, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery beyond the limit is refused, and the job stays where it is."""
    monkeypatch.setattr("studio_worker.local_studio.web.bodies.MAX_UPLOAD_BYTES", 2000)
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id, b"x" * 3000).status_code == 413
    assert studio.job(job_id).status == "running"


def test_json_results_come_over_the_session(studio: LocalStudio, machine: Machine) -> None:
    """A text job is completed by completeJson, acknowledged, and followed by the next offer."""
    chat = {"kind": "llm", "messages": [{"role": "user", "content": "hi"}]}
    job_id = studio.queue_job(model="m", task=chat, model_source=SOURCE | {"engine": "llama-cpp"})
    next_id = queue(studio)
    assert machine.take()["task"] == chat
    assert machine.upload(job_id).status_code == 400
    machine.say("completeJson", jobId=job_id, result={"choices": []}, prompt="hi")
    assert machine.hear() == {"type": "completeAck", "jobId": job_id}
    assert machine.hear()["claim"]["jobId"] == next_id
    assert json.loads(studio.result(job_id)) == {"choices": []}
    assert studio.job(job_id).completions == 1


@pytest.mark.parametrize(("kind", "result"), [("image", {}), ("llm", float("nan"))])
def test_json_result_that_cannot_be_is_a_violation(
    studio: LocalStudio, machine: Machine, kind: str, result: Any
) -> None:
    """A picture is delivered by upload, and a JSON result must be JSON; the job goes back to the queue."""
    job_id = queue(studio, task={"kind": kind})
    machine.take()
    machine.say("completeJson", jobId=job_id, result=result)
    assert machine.closing()[1] == 4002
    studio.wait_for(lambda: studio.job(job_id).status == "queued", WAIT_S)


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
