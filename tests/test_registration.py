"""Registration: from nothing to credentials, over every answer a studio may give."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from studio_worker.errors import ConfigError, RefusedByStudio
from studio_worker.local_studio import LocalStudio
from studio_worker.studio.api import StudioApi
from studio_worker.studio.registration import Credentials, IdentityFile, Registration
from tests.scripted import ScriptedHttp
from tests.test_wire import CAPABILITIES, CAPABILITIES_JSON

REQUESTED = (200, {}, {"requestId": "r1", "status": "pending"})
PENDING = (200, {}, {"status": "pending"})
APPROVED = (200, {}, {"status": "approved", "workerId": "w1", "authToken": "token-of-w1"})


def registration(
    url: str, folder: Path, stop: threading.Event | None = None, said: list[str] | None = None
) -> Registration:
    """A registration that does not wait between polls."""
    return Registration(
        StudioApi(url),
        IdentityFile(folder / "identity.json"),
        lambda: CAPABILITIES,
        on_waiting=(said if said is not None else []).append,
        stop=stop or threading.Event(),
        tick_s=0.0,
    )


def stored(folder: Path) -> dict[str, Any]:
    """The identity file's content."""
    content: dict[str, Any] = json.loads((folder / "identity.json").read_text())
    return content


def test_registration_sends_only_the_secrets_hash(tmp_path: Path) -> None:
    """The request holds the SHA-256 of the secret's 64 characters; the secret itself is the poll's bearer."""
    with ScriptedHttp(REQUESTED, PENDING, APPROVED) as server:
        assert registration(server.url, tmp_path).run() == Credentials("w1", "token-of-w1")
    request, *polls = server.heard
    body = json.loads(request.body)
    assert request.path == "/graphics/api/workers/register-request"
    assert "authorization" not in request.headers
    assert set(body) == {"installId", "registrationSecretHash", "capabilities", "userAgent"}
    assert body["capabilities"] == CAPABILITIES_JSON
    assert body["userAgent"].startswith("studio-worker/")
    for poll in polls:
        assert poll.path == "/graphics/api/workers/register-requests/r1"
        scheme, secret = poll.headers["authorization"].split()
        assert scheme == "Bearer"
        assert len(secret) == 64
        assert body["registrationSecretHash"] == hashlib.sha256(secret.encode()).hexdigest()
        assert secret.encode() not in request.body


def test_registration_approved_keeps_token_and_drops_secret(tmp_path: Path) -> None:
    """After approval the file (0600) holds id and token and no secret, and the next start asks nobody."""
    with ScriptedHttp(REQUESTED, APPROVED) as server:
        registration(server.url, tmp_path).run()
        install_id = stored(tmp_path)["install_id"]
        again = registration(server.url, tmp_path).run()
    assert again == Credentials("w1", "token-of-w1")
    assert len(server.heard) == 2
    assert stored(tmp_path) == {
        "install_id": install_id, "worker_id": "w1", "auth_token": "token-of-w1",
    }  # fmt: skip
    assert (tmp_path / "identity.json").stat().st_mode & 0o777 == 0o600


def test_registration_goes_on_with_the_same_request_after_a_restart(tmp_path: Path) -> None:
    """A box that was switched off while it waited for approval polls the request it made before."""
    stop = threading.Event()
    with ScriptedHttp(REQUESTED, PENDING) as server:
        waiting = Registration(
            StudioApi(server.url), IdentityFile(tmp_path / "identity.json"), lambda: CAPABILITIES,
            on_waiting=lambda line: stop.set(), stop=stop, tick_s=0.0,
        )  # fmt: skip
        assert waiting.run() is None
    assert stored(tmp_path)["request_id"] == "r1"
    with ScriptedHttp(APPROVED) as server:
        assert registration(server.url, tmp_path).run() == Credentials("w1", "token-of-w1")
    assert [heard.method for heard in server.heard] == ["GET"]


@pytest.mark.parametrize("status", [404, 401])
def test_registration_unknown_to_the_studio_starts_over_with_a_new_secret(
    tmp_path: Path, status: int
) -> None:
    """A studio that lost the request gets a new one, with a new secret and the same install id."""
    with ScriptedHttp(REQUESTED, (status, {}, {}), REQUESTED, APPROVED) as server:
        assert registration(server.url, tmp_path).run() is not None
    first, _, second, _ = server.heard
    before, after = json.loads(first.body), json.loads(second.body)
    assert before["installId"] == after["installId"]
    assert before["registrationSecretHash"] != after["registrationSecretHash"]


@pytest.mark.parametrize(
    "answer",
    [(500, {}, {}), (429, {"Retry-After": "0"}, {}), (200, {}, b"<html>"), (200, {}, {"status": "odd"})],
)
def test_registration_keeps_its_state_over_passing_errors(tmp_path: Path, answer: Any) -> None:
    """A studio that is down, busy or talks nonsense is asked again; nothing is thrown away."""
    with ScriptedHttp(answer, REQUESTED, answer, APPROVED) as server:
        assert registration(server.url, tmp_path).run() is not None
    assert [heard.method for heard in server.heard] == ["POST", "POST", "GET", "GET"]
    hashes = {json.loads(h.body)["registrationSecretHash"] for h in server.heard if h.method == "POST"}
    assert len(hashes) == 1


def test_registration_rejected_is_final_until_reset(tmp_path: Path) -> None:
    """A rejected worker asks no more, also after a restart; `register --reset` lets it ask anew."""
    rejected = (200, {}, {"status": "rejected", "reason": "not ours"})
    with ScriptedHttp(REQUESTED, rejected) as server:
        for _ in range(2):
            with pytest.raises(RefusedByStudio, match=r"not ours.*register --reset") as caught:
                registration(server.url, tmp_path).run()
            assert caught.value.exit_status == 77
    assert len(server.heard) == 2
    install_id = stored(tmp_path)["install_id"]
    file = IdentityFile(tmp_path / "identity.json")
    file.reset()
    assert file.load().install_id != install_id


def test_registration_tells_the_operator_what_to_do(tmp_path: Path) -> None:
    """The status line names the machine to approve and the studio's address."""
    said: list[str] = []
    with ScriptedHttp(REQUESTED, APPROVED) as server:
        registration(server.url, tmp_path, said=said).run()
    assert said == [f"waiting for approval: approve box at {server.url}"]


def test_registration_with_a_damaged_identity_names_the_cure(tmp_path: Path) -> None:
    """An unreadable identity stops the service with file and cure; it is never silently replaced."""
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(ConfigError, match=r"identity\.json.*register --reset"):
        registration("http://127.0.0.1:9", tmp_path).run()


def test_registration_is_approved_by_a_person_at_the_local_studio(
    tmp_path: Path, studio: LocalStudio
) -> None:
    """Against the local studio a request appears by machine name, and approving it gives credentials."""
    got: list[Credentials | None] = []
    thread = threading.Thread(target=lambda: got.append(registration(studio.base_url, tmp_path).run()))
    thread.start()
    studio.wait_for(lambda: bool(studio.pending()))
    assert studio.pending()[0].capabilities.machine_name == "box"
    worker_id = studio.approve(studio.pending()[0].request_id)
    thread.join(20)
    assert got[0] is not None
    assert got[0].worker_id == worker_id
