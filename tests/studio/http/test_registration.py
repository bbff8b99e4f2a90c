"""Registration: from nothing to credentials, over every answer a studio may give."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from studio_worker.errors import ConfigError, RefusedByStudio
from studio_worker.local_studio import LocalStudio
from studio_worker.report import logs
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import (
    Credentials,
    Identity,
    IdentityFile,
    Standing,
    given_credentials,
)
from studio_worker.studio.http.registration import Registration
from tests.fakes.scripted import ScriptedHttp
from tests.lab.frames import CAPABILITIES, CAPABILITIES_JSON

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
    assert said == [f"waiting for approval: approve box at {server.url} (asked about every 0 s)"]


def test_registration_that_cannot_reach_the_studio_says_so_while_it_lasts(tmp_path: Path) -> None:
    """The status line names what keeps the worker from the studio, and later what is waited for instead."""
    said: list[str] = []
    not_there = (404, {}, {})
    with ScriptedHttp(not_there, not_there, REQUESTED, (502, {}, {}), PENDING, APPROVED) as server:
        registration(server.url, tmp_path, said=said).run()
    approval = f"waiting for approval: approve box at {server.url} (asked about every 0 s)"
    assert said == [
        "registration has to wait: the studio answered HTTP 404; is [studio] api_base_url right?",
        approval,
        "registration has to wait: the studio answered HTTP 502",
        approval,
    ]


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


# --- every answer and every crash ---


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b""),
        (200, {}, b"\xff\xfe"),
        (200, {}, b"[" * 100_000),
        (200, {}, {"status": "approved"}),
        (200, {}, {"status": "approved", "workerId": "", "authToken": "token"}),
        (200, {}, {"status": "approved", "workerId": "w", "authToken": ""}),
        (200, {}, {"status": "approved", "workerId": "w", "authToken": "two\r\nlines"}),
        (200, {}, {"status": "approved", "workerId": 7, "authToken": "token"}),
        (200, {}, []),
        (302, {"Location": "/elsewhere"}, {}),
        (400, {}, {}),
        (403, {}, {}),
        (418, {}, {}),
        (502, {}, b"<html>"),
    ],
)
def test_registration_outlasts_nonsense(tmp_path: Path, answer: Any) -> None:
    """No answer whatever to a poll throws the request away, or makes credentials out of nothing."""
    with ScriptedHttp(REQUESTED, answer, APPROVED) as server:
        assert registration(server.url, tmp_path).run() == Credentials("w1", "token-of-w1")
    assert [heard.method for heard in server.heard] == ["POST", "GET", "GET"]


@pytest.mark.parametrize(
    "answer",
    [(200, {}, {}), (200, {}, {"requestId": ""}), (200, {}, {"requestId": 7}), (404, {}, {}), (401, {}, {})],
)
def test_registration_asks_again_where_the_request_is_not_answered(tmp_path: Path, answer: Any) -> None:
    """An answer without a request id is no answer; the same secret is sent again."""
    with ScriptedHttp(answer, REQUESTED, APPROVED) as server:
        assert registration(server.url, tmp_path).run() is not None
    hashes = {json.loads(h.body)["registrationSecretHash"] for h in server.heard if h.method == "POST"}
    assert [heard.method for heard in server.heard] == ["POST", "POST", "GET"]
    assert len(hashes) == 1


def test_registration_known_already_is_polled(tmp_path: Path) -> None:
    """A studio that says more than pending to a request is asked for its decision all the same."""
    with ScriptedHttp((201, {}, {"requestId": "r1", "status": "approved", "extra": 1}), APPROVED) as server:
        assert registration(server.url, tmp_path).run() == Credentials("w1", "token-of-w1")


def test_registration_waits_as_long_as_the_studio_asks(tmp_path: Path) -> None:
    """Retry-After longer than the tick wins; a shorter one does not hurry."""
    waits: list[float | None] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return False

    answers = [
        (429, {"Retry-After": "90"}, {}),
        (503, {"Retry-After": "3"}, {}),
        REQUESTED,
        (429, {"Date": "Thu, 01 Jan 1970 00:00:00 GMT", "Retry-After": "Thu, 01 Jan 1970 00:02:00 GMT"}, {}),
        PENDING,
        APPROVED,
    ]
    with ScriptedHttp(*answers) as server:
        Registration(
            StudioApi(server.url), IdentityFile(tmp_path / "identity.json"), lambda: CAPABILITIES,
            on_waiting=lambda line: None, stop=Stop(), tick_s=30.0,
        ).run()  # fmt: skip
    assert waits == [90.0, 30.0, 120.0, 30.0]


class Killed(BaseException):
    """Stands for kill -9: nothing handles it."""


class DyingFile(IdentityFile):
    """Dies right before, or right after, its n-th write."""

    def __init__(self, path: Path, dies_at: int, *, after: bool) -> None:
        super().__init__(path)
        self._left = dies_at
        self._after = after

    def save(self, identity: Identity) -> Identity:
        self._left -= 1
        if self._left == 0 and not self._after:
            raise Killed
        saved = super().save(identity)
        if self._left == 0:
            raise Killed
        return saved


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(1, 6))
def test_registration_killed_between_any_two_steps_goes_on(
    tmp_path: Path, studio: LocalStudio, step: int, after: bool
) -> None:
    """A kill before or after any write leaves a state that the next start comes to the same worker from."""
    path = tmp_path / "identity.json"

    def run(file: IdentityFile) -> Credentials | None:
        def approve(_line: str) -> None:
            for request in studio.pending():
                studio.approve(request.request_id)

        return Registration(
            StudioApi(studio.base_url), file, lambda: CAPABILITIES,
            on_waiting=approve, stop=threading.Event(), tick_s=0.0,
        ).run()  # fmt: skip

    try:
        first = run(DyingFile(path, step, after=after))
    except Killed:
        first = None
    if path.exists():
        assert path.stat().st_mode & 0o777 == 0o600
        IdentityFile(path).load()
    second = run(IdentityFile(path))
    assert second is not None
    assert first in {None, second}
    assert [worker.worker_id for worker in studio.workers()] == [second.worker_id]
    assert stored(tmp_path).keys() == {"install_id", "worker_id", "auth_token"}


@pytest.mark.parametrize("seed", range(3))
def test_registration_of_a_killed_process_is_never_damaged(tmp_path: Path, seed: int) -> None:
    """kill -9 at any moment of writing leaves one identity or the other, whole, for its user alone."""
    script = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from studio_worker.studio.http.identity import IdentityFile\n"
        "file = IdentityFile(Path(sys.argv[1])); identity = file.load(); print('ready', flush=True)\n"
        "while True:\n"
        "    identity = file.save(replace(identity, secret='a' * 64, request_id='r'))\n"
        "    identity = file.save(replace(identity, secret=None, request_id=None))\n"
    )
    path = tmp_path / "identity.json"
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    install_id = IdentityFile(path).load().install_id
    threading.Event().wait(random.Random(seed).uniform(0.0, 0.1))
    child.kill()
    child.communicate()
    identity = IdentityFile(path).load()
    assert identity.install_id == install_id
    assert identity.standing in {Standing.PRISTINE, Standing.PENDING}


# --- what lies on disk ---


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"install_id": 5}', b'{"install_id": null}', b"\0" * 100, b"\xff",
     b'{"install_id": "i", "worker_id": "w", "auth_token": "two\\nlines"}'],
)  # fmt: skip
def test_damaged_identity_names_file_and_cure_and_is_kept(tmp_path: Path, content: bytes) -> None:
    """An identity that cannot be read is an error with file and cure; it is never replaced or quoted."""
    path = tmp_path / "identity.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"identity\.json.*register --reset") as caught:
        IdentityFile(path).load()
    assert path.read_bytes() == content
    assert "lines" not in str(caught.value)


def test_identity_that_is_no_file_names_the_cure(tmp_path: Path) -> None:
    """A folder in its place, or a file of somebody else, is one line, not a traceback."""
    (tmp_path / "identity.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        IdentityFile(tmp_path / "identity.json").load()


def test_identity_on_a_full_disk_names_the_cure(small_disk: Path) -> None:
    """Where a new identity cannot be written, that is said with file and cure; systemd may try again."""
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    with pytest.raises(ConfigError, match=r"cannot be written: No space left.*make room") as caught:
        IdentityFile(small_disk / "identity.json").load()
    assert caught.value.exit_status == 75


def test_identity_of_a_later_version_is_read(tmp_path: Path) -> None:
    """After a downgrade the worker is still the same worker."""
    path = tmp_path / "identity.json"
    path.write_text('{"install_id": "i", "worker_id": "w", "auth_token": "t", "fingerprint": [1]}')
    assert IdentityFile(path).load().credentials == Credentials("w", "t")


@pytest.mark.parametrize(
    "half",
    ['"request_id": "r"', '"secret": "s"', '"worker_id": "w"', '"auth_token": "t"', '"request_id": ""'],
)
def test_identity_with_half_of_a_pair_begins_anew(tmp_path: Path, half: str) -> None:
    """A request without its secret, or a worker without its token, is asked for anew."""
    path = tmp_path / "identity.json"
    path.write_text(f'{{"install_id": "i", {half}}}')
    assert IdentityFile(path).load().standing is Standing.PRISTINE
    with ScriptedHttp(REQUESTED, APPROVED) as server:
        assert registration(server.url, tmp_path).run() == Credentials("w1", "token-of-w1")
    assert json.loads(server.heard[0].body)["installId"] == "i"


def test_identity_readable_by_others_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A token that came back from a backup for everybody to read is hidden again, and that is logged."""
    path = tmp_path / "identity.json"
    path.write_text('{"install_id": "i", "worker_id": "w", "auth_token": "t"}')
    path.chmod(0o644)
    IdentityFile(path).load()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [record.message for record in caplog.records] == ["identity was readable by others"]


# --- credentials from systemd ---


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as systemd gives it to a unit with LoadCredential=."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return folder


def test_credentials_from_systemd_replace_the_registration(credentials: Path) -> None:
    """A worker that is given its id and token asks nobody."""
    assert given_credentials() is None
    (credentials / "studio-worker.worker-id").write_text("w1\n")
    (credentials / "studio-worker.auth-token").write_text("secret-token-of-w1\n")
    assert given_credentials() == Credentials("w1", "secret-token-of-w1")
    assert "secret-token" not in logs.redact("the token is secret-token-of-w1")


@pytest.mark.parametrize(
    ("worker_id", "token", "problem"),
    [
        ("w1", None, "auth-token: is missing beside the other one"),
        (None, "t", "worker-id: is missing beside the other one"),
        ("", "t", "worker-id: is empty"),
        ("w1", "two words", "auth-token: is empty or no single word"),
        ("w1", "ä", "auth-token"),
    ],
)
def test_half_given_credentials_are_a_mistake_that_is_named(
    credentials: Path, worker_id: str | None, token: str | None, problem: str
) -> None:
    """One credential without the other never makes a worker register under a new name instead."""
    for name, value in (("worker-id", worker_id), ("auth-token", token)):
        if value is not None:
            (credentials / f"studio-worker.{name}").write_text(value)
    with pytest.raises(ConfigError, match=problem):
        given_credentials()
