"""How machines become workers of the local studio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
from websockets.exceptions import InvalidStatus

from studio_worker.local_studio import LocalStudio
from tests.fakes.machine import CAPABILITIES, WAIT_S, Machine


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
