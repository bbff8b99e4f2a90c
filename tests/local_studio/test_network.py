"""The local studio where strangers reach its port: silence, floods, odd encodings, a full disk."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import select
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.local_studio import Door, LocalStudio, registry
from studio_worker.local_studio.registry import Registry, TooManyPending
from studio_worker.local_studio.waiting_room import FIRST_POLL_S, SILENT_S
from studio_worker.local_studio.web import visit
from studio_worker.local_studio.web.seldom import Seldom
from studio_worker.studio import wire
from tests.fakes.machine import CAPABILITIES, Machine, queue

TOKEN = "a token of sufficient length"
WAIT_S = 10.0


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    with LocalStudio(tmp_path / "studio.sqlite3", door=Door(token=TOKEN), models_dir=tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStudio]:
    """One studio for all tests that do not mind what others left in it."""
    folder = tmp_path_factory.mktemp("studio")
    with LocalStudio(folder / "studio.sqlite3", door=Door(token=TOKEN), models_dir=folder) as running:
        yield running


def ask(
    studio: LocalStudio, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=WAIT_S)
    try:
        connection.request(
            method, path, body, {name.replace("_", "-"): text for name, text in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def dial(studio: LocalStudio, begin: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", studio.port), WAIT_S)
    connection.sendall(begin)
    return connection


def is_hung_up(connection: socket.socket) -> bool:
    """Whether the studio closes within the test's time."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


# --- connections ------------------------------------------------------------------------------------


def test_strangers_who_say_nothing_keep_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more silent connections than there is room for, pages and workers are served as ever."""
    monkeypatch.setattr("studio_worker.local_studio.server.MAX_CONNECTIONS", 16)
    with LocalStudio(tmp_path / "studio.sqlite3") as studio:
        worker = Machine(studio).connect()
        half = b"POST /graphics/api/workers/register-request HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        half += b"Content-Length: 9\r\n\r\n{"
        silent = [dial(studio, half if number % 2 else b"") for number in range(60)]
        assert ask(studio, "GET", "/page/icon.svg")[0] == 200
        worker.beat()
        open_yet = len(silent) - len(select.select(silent, [], [], 0)[0])
        assert open_yet <= 16
        worker.beat()
        for each in silent:
            each.close()
        assert worker.socket is not None
        worker.socket.close()


def test_flood_of_connections_writes_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand connections too many are no thousand lines in the log."""
    monkeypatch.setattr("studio_worker.local_studio.server.MAX_CONNECTIONS", 8)
    for each in logging.getLogger(visit.__name__).filters:
        assert isinstance(each, Seldom)
        monkeypatch.setattr(each, "_counts", {})
    with LocalStudio(tmp_path / "studio.sqlite3") as studio, caplog.at_level(logging.WARNING):
        silent = [dial(studio) for _ in range(40)]
        assert ask(studio, "GET", "/page/icon.svg")[0] == 200
        for each in silent:
            each.close()
    assert [record.getMessage() for record in caplog.records if "too many" in record.getMessage()] == [
        "too many connections; the one that was waited for longest is closed"
    ]


@pytest.mark.parametrize(
    "begin",
    [
        pytest.param(b"", id="silent"),
        pytest.param(b"GET / HT", id="half a line"),
        pytest.param(
            b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\ntoken=", id="half a body"
        ),
        pytest.param(
            b"GET /page/icon.svg HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHo", id="half a second one"
        ),
    ],
)
def test_request_that_does_not_come_is_not_waited_for(
    studio: LocalStudio, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    """A connection whose request never gets whole is closed."""
    for name in ("HEAD_S", "STALL_S", "_LOOK_EVERY_S"):
        monkeypatch.setattr(visit, name, 0.05)
    with dial(studio, begin) as connection:
        assert is_hung_up(connection)
    assert ask(studio, "GET", "/page/icon.svg")[0] == 200


def test_body_that_drips_is_not_waited_for(studio: LocalStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that comes, but far too slowly, ends like one that does not come."""
    monkeypatch.setattr(visit, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(visit, "BODY_GRACE_S", 0.05)
    monkeypatch.setattr(visit, "BODY_BYTES_PER_S", 1e9)
    with dial(
        studio, b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\ntoken="
    ) as connection:
        assert is_hung_up(connection)


def test_answer_that_is_not_taken_is_not_waited_for(
    studio: LocalStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for a large file and does not read it loses the connection."""
    monkeypatch.setattr(visit, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(visit, "STALL_S", 0.2)
    (tmp_path / "large.safetensors").write_bytes(bytes(32 << 20))
    with dial(studio, b"GET /models/large.safetensors HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        hung_up = select.poll()
        hung_up.register(connection, select.POLLHUP)
        assert hung_up.poll(WAIT_S * 1000)


# --- bodies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "charset", ["punycode", "utf-16", "idna", "unicode_escape", "undefined", "utf-8-sig", "nope"]
)
@pytest.mark.parametrize("path", ["/login", "/api/files"])
def test_client_chooses_no_codec(anywhere: LocalStudio, path: str, charset: str) -> None:
    """Forms are UTF-8; a client that names another codec, some of which take minutes, is refused."""
    body = b'--x\r\nContent-Disposition: form-data; name="token"\r\n\r\n-' + b"b" * 100_000 + b"\r\n--x--\r\n"
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    assert ask(anywhere, "POST", path, body, Content_Type=kind, Authorization=f"Bearer {TOKEN}")[0] in {
        400,
        413,
    }


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"token=%ED%A0%80", id="half a character"),
        pytest.param(b"token=\xff", id="no ASCII"),
        pytest.param(b"&".join(b"a%d=1" % number for number in range(100)), id="many fields"),
    ],
)
def test_login_with_a_broken_form_is_400(anywhere: LocalStudio, body: bytes) -> None:
    """What no browser sends is refused with a sentence."""
    status, content = ask(
        anywhere, "POST", "/login", body, Content_Type="application/x-www-form-urlencoded; charset=utf-7"
    )
    assert status == 400
    assert json.loads(content)["error"]


@pytest.mark.parametrize("length", [256, 5000])
def test_model_file_with_a_name_too_long_is_not_found(anywhere: LocalStudio, length: int) -> None:
    """A name that no file can have is one that is not there."""
    assert ask(anywhere, "GET", "/models/" + "a" * length)[0] == 404


# --- registration -----------------------------------------------------------------------------------


def asking(name: str = "box", **changes: Any) -> dict[str, Any]:
    return {
        "installId": str(uuid.uuid4()),
        "registrationSecretHash": hashlib.sha256(b"s").hexdigest(),
        "capabilities": CAPABILITIES | {"machineName": name},
        "userAgent": "u",
    } | changes


@pytest.mark.parametrize("field", ["machineName", "username", "agentVersion", "userAgent"])
def test_registration_with_a_name_too_long_is_refused(anywhere: LocalStudio, field: str) -> None:
    """What the page shows of a machine is never longer than a name."""
    body = asking()
    (body if field == "userAgent" else body["capabilities"])[field] = "x" * 201
    path = "/graphics/api/workers/register-request"
    status, content = ask(anywhere, "POST", path, json.dumps(body).encode())
    assert status == 400
    assert f"{field}: must have at most 200 characters" in json.loads(content)["error"]


class Entrance:
    """Registrations from chosen addresses at chosen times."""

    def __init__(self, studio: LocalStudio) -> None:
        self.now = 1000.0
        self.registry = Registry(studio.database, lambda: self.now)

    def asks(self, origin: str) -> str:
        body = wire.RegisterRequest.model_validate(asking())
        return self.registry.request(body, origin).request_id

    def polls(self, request_id: str) -> None:
        self.registry.decision(request_id, "s")

    def waiting(self) -> set[str]:
        return {entry.request_id for entry in self.registry.pending()}


@pytest.fixture
def entrance(studio: LocalStudio, monkeypatch: pytest.MonkeyPatch) -> Entrance:
    monkeypatch.setattr(registry, "MAX_PENDING", 10)
    return Entrance(studio)


def test_invented_requests_of_one_address_make_room_for_another(entrance: Entrance) -> None:
    """Who fills all places from one address keeps nobody else out, even if each of them is asked about."""
    real = entrance.asks("10.0.0.1")
    fakes = [entrance.asks("10.6.6.6") for _ in range(9)]
    for each in fakes:
        entrance.polls(each)
    second = entrance.asks("10.0.0.2")
    assert {real, second} < entrance.waiting()
    assert len(entrance.waiting()) == 10


def test_requests_nobody_asks_about_make_room(entrance: Entrance) -> None:
    """From one's own address, too, a worker gets in among requests that were never asked about again."""
    real = entrance.asks("127.0.0.1")
    entrance.polls(real)
    for _ in range(9):
        entrance.asks("127.0.0.1")
    with pytest.raises(TooManyPending):
        entrance.asks("127.0.0.1")
    entrance.now += FIRST_POLL_S + 1
    second = entrance.asks("127.0.0.1")
    entrance.polls(second)
    assert {real, second} <= entrance.waiting()


def test_workers_that_wait_for_a_person_keep_their_places(entrance: Entrance) -> None:
    """Real workers, which ask every half minute, are pushed out by none from their own network."""
    real = {entrance.asks("192.168.1.5") for _ in range(10)}
    for _ in range(20):
        entrance.now += 30
        for each in real:
            entrance.polls(each)
        with pytest.raises(TooManyPending):
            entrance.asks("192.168.1.5")
    assert entrance.waiting() == real
    entrance.now += SILENT_S + 1
    assert entrance.asks("192.168.1.5") in entrance.waiting()


# --- the disk ---------------------------------------------------------------------------------------


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("full", ["database", "folder"])
@pytest.mark.sqlite
def test_full_disk_is_507_and_the_picture_comes_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """An upload that finds no room is told so, its session goes on, and it is welcome afterwards."""
    with LocalStudio(tmp_path / "studio.sqlite3") as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio)
        machine.take()
        with studio.database.reading() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            if full == "database":
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with caplog.at_level(logging.INFO), monkeypatch.context() as patch:
            if full == "folder":
                patch.setattr("studio_worker.files.os.fsync", full_disk)
            refused = machine.upload(job_id, prompt="x" * 900_000)
            machine.say(
                "logBatch", entries=[{"ts": "now", "level": "info", "category": "x", "message": "m" * 99_999}]
            )
            machine.beat(job_id)
        assert refused.status_code == 507
        assert "disk" in refused.json()["error"]
        assert not [record for record in caplog.records if record.exc_info]
        assert list((tmp_path / "pictures").glob("*-*")) == [], "nothing is left of what was refused"
        with studio.database.reading() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        assert machine.upload(job_id, prompt="x" * 900_000).status_code == 200
        assert machine.socket is not None
        machine.socket.close()


def test_lines_that_strangers_cause_are_limited() -> None:
    """Of each message so many lines are written in a while; the next one afterwards counts the others."""
    now = [0.0]
    limit = Seldom(2, every_s=60, clock=lambda: now[0])

    def line(text: str) -> logging.LogRecord | None:
        record = logging.LogRecord("x", logging.INFO, "", 0, text, (), None)
        return record if limit.filter(record) else None

    assert [line("flood") is not None for _ in range(5)] == [True, True, False, False, False]
    assert line("other") is not None
    now[0] = 61
    told = line("flood")
    assert told is not None
    assert told.__dict__["lines_left_out"] == 3
