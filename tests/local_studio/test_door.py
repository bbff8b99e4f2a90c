"""The local studio's door: what it demands beyond this machine, its certificate, a proxy in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import requests
from PIL import Image

from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import ConfigError
from studio_worker.local_studio import Door, LocalStudio, Tls
from studio_worker.local_studio.web.seldom import Seldom
from studio_worker.local_studio.web.visit import Visit
from tests.fakes.certificates import Certificate, certificate
from tests.fakes.machine import PICTURE, Machine, queue
from tests.lab.service import DONE_S, READY_S, await_status, queue_synthetic

TOKEN = "a token of sufficient length"
WAIT_S = 10.0
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate of this machine that nobody changes."""
    return certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def studio(tmp_path: Path, shown: Certificate, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalStudio]:
    """A studio with that certificate, whose authority all clients of the test believe in."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(shown.authority))
    door = Door(token=TOKEN, tls=Tls(shown.shown, shown.key))
    with LocalStudio(tmp_path / "studio.sqlite3", door=door, auto_approve=True) as running:
        yield running


def serial_shown(port: int) -> str:
    """The number of the certificate that a client is shown."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as plain, context.wrap_socket(plain) as secure:
        pem = ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")
    command = ["openssl", "x509", "-noout", "-fingerprint"]
    return subprocess.run(command, input=pem, capture_output=True, text=True, check=True).stdout


# --- what is demanded -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "studio.example"])
def test_network_needs_a_token_and_https(tmp_path: Path, host: str) -> None:
    """Beyond loopback a token alone is not enough; the refusal names every way to have it right."""
    with pytest.raises(ConfigError, match="--token-file"):
        LocalStudio(tmp_path / "studio.sqlite3", door=Door(host))
    with pytest.raises(ConfigError, match=r"--certificate and --key.*--behind-proxy.*--plain-http"):
        LocalStudio(tmp_path / "studio.sqlite3", door=Door(host, token=TOKEN))


def test_certificate_does_not_stand_in_for_a_token(tmp_path: Path, shown: Certificate) -> None:
    """Strangers are kept out by the token, however well the way is encrypted."""
    with pytest.raises(ConfigError, match="--token-file"):
        LocalStudio(tmp_path / "studio.sqlite3", door=Door("0.0.0.0", tls=Tls(shown.shown, shown.key)))
    with pytest.raises(ConfigError, match="--token-file"):
        LocalStudio(tmp_path / "studio.sqlite3", door=Door("0.0.0.0", proxies=("127.0.0.1",)))
    with pytest.raises(ConfigError, match="--token-file"):
        LocalStudio(tmp_path / "studio.sqlite3", door=Door("0.0.0.0", is_plain=True))


def test_proxy_on_loopback_needs_a_token_too(tmp_path: Path) -> None:
    """Behind a proxy the network reaches a studio that itself listens on loopback."""
    with pytest.raises(ConfigError, match="--token-file"):
        LocalStudio(tmp_path / "studio.sqlite3", door=Door(proxies=("127.0.0.1",)))


def test_proxy_that_is_no_address_is_a_clear_mistake(tmp_path: Path) -> None:
    """A proxy is named by its address or network, and a name is refused with an example."""
    with pytest.raises(ConfigError, match=r"proxy\.example.*10\.0\.0\.0/24"):
        LocalStudio(tmp_path / "studio.sqlite3", door=Door(token=TOKEN, proxies=("proxy.example",)))


# --- its own certificate ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
def test_studio_speaks_https_and_nothing_else(studio: LocalStudio) -> None:
    """Page, api and addresses are https; plain http at the same port, and TLS before 1.2, get nothing."""
    assert studio.base_url == f"https://127.0.0.1:{studio.port}"
    state = requests.get(f"{studio.base_url}/api/state", headers=BEARER, timeout=WAIT_S)
    assert state.json()["baseUrl"] == studio.base_url
    login = requests.post(
        f"{studio.base_url}/login", data={"token": TOKEN}, timeout=WAIT_S, allow_redirects=False
    )
    assert "Secure" in login.headers["Set-Cookie"]
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{studio.port}/page/icon.svg", timeout=WAIT_S)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")  # or OpenSSL would not even ask for a version that is so old
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", studio.port), WAIT_S) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain)


def test_large_bodies_go_both_ways_over_https(studio: LocalStudio, shown: Certificate) -> None:
    """What is larger than any buffer arrives whole, up and down."""
    content = PICTURE + bytes(range(256)) * 40_000
    machine = Machine(studio, approve=False)
    machine.fetch_token()
    machine.connect(tls=ssl.create_default_context(cafile=shown.authority))
    job_id = queue(studio, task={"initImageUrl": "/files/x"})
    assert machine.take()["task"]["initImageUrl"] == f"{studio.base_url}/files/x"
    assert machine.upload(job_id, content).status_code == 200
    machine.hang_up()
    result = requests.get(f"{studio.base_url}/api/jobs/{job_id}/result", headers=BEARER, timeout=WAIT_S)
    assert result.content == content


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(
            lambda it: it.key.chmod(0o644), r"key\.pem: --key: others can read it; chmod 600", id="open"
        ),
        pytest.param(
            lambda it: it.key.unlink(), r"key\.pem: --key: cannot be read: No such file", id="no key"
        ),
        pytest.param(
            lambda it: it.shown.unlink(), r"cert\.pem: --certificate: cannot be read", id="no certificate"
        ),
        pytest.param(
            lambda it: (it.shown.unlink(), it.shown.mkdir(), shutil.copy(it.authority, it.shown)),
            r"cert\.pem: --certificate: is a folder; name a file",
            id="a folder",
        ),
        pytest.param(lambda it: it.key.write_text("x"), r"key\.pem: --key: holds no usable key", id="no PEM"),
        pytest.param(lambda it: it.shown.write_text("x"), "holds no certificate in PEM", id="no PEM either"),
        pytest.param(
            lambda it: shutil.copyfile(it.key.with_name("ca.key"), it.key),
            r"key\.pem: --key: is not the key of .*cert\.pem",
            id="another's key",
        ),
        pytest.param(
            lambda it: subprocess.run(
                f"openssl pkey -in {it.key} -aes128 -passout pass:secret -out locked"
                f" && mv locked {it.key} && chmod 600 {it.key}",
                cwd=it.key.parent,
                shell=True,
                check=True,
            ),
            "is locked with a password; openssl pkey -in",
            id="locked",
        ),
        pytest.param(
            lambda it: (it.key.unlink(), it.key.mkdir(), it.key.chmod(0o755)),
            r"key\.pem: --key: is a folder; name a file",
            id="a folder as key",
        ),
        pytest.param(
            lambda it: it.shown.write_text(it.authority.read_text() + it.shown.read_text()),
            r"cert\.pem: --certificate: does not begin with the certificate of .*key\.pem; put that first",
            id="authority first",
        ),
        pytest.param(
            lambda it: own_certificate(it, "rsa:512"),
            r"cert\.pem: --certificate: is too weak for any client \(ee key too small\); make a new key",
            id="weak",
        ),
        pytest.param(
            lambda it: own_certificate(it, "ec -pkeyopt ec_paramgen_curve:secp256k1"),
            r"cert\.pem: --certificate: no client could speak with it \(.*\); make a new key",
            id="strange",
        ),
    ],
)
def test_certificate_that_cannot_be_used_is_a_clear_mistake(spoil: Any, said: str) -> None:
    """Whatever is wrong with certificate or key is told before the start, with file, option and cure."""
    with _public_folder() as folder:
        files = certificate(folder)
        spoil(files)
        with pytest.raises(ConfigError, match=said):
            Tls(files.shown, files.key)


def own_certificate(files: Certificate, kind: str) -> None:
    """Put one in the place of ``files`` with a key that openssl makes of ``kind``."""
    subprocess.run(
        "openssl req -x509 -newkey $KIND -nodes -keyout $KEY"
        " -out $SHOWN -days 10000 -subj /CN=studio.test -sha256 2>&1",
        cwd=files.key.parent,
        shell=True,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "KIND": kind, "KEY": str(files.key), "SHOWN": str(files.shown)},
    )


def test_key_that_was_forgotten_is_asked_for() -> None:
    """A certificate that everybody may read gives nothing away: what is missing is the file of its key."""
    with _public_folder() as folder:
        files = certificate(folder)
        files.shown.chmod(0o644)
        with pytest.raises(
            ConfigError, match=r"cert\.pem: --certificate: holds no key; name its file with --key"
        ):
            Tls(files.shown)


@contextlib.contextmanager
def _public_folder() -> Iterator[Path]:
    """One that all users may enter, as /etc: pytest's own keep keys from others anyway."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("valid", "said"),
    [
        (("20200101000000Z", "20210101000000Z"), "has expired"),
        (("20900101000000Z", "20910101000000Z"), "not yet valid"),
    ],
    ids=["ended", "future"],
)
def test_certificate_of_another_time_is_refused(tmp_path: Path, valid: tuple[str, str], said: str) -> None:
    """A certificate that no client would believe now does not start, with the clock as one cause."""
    files = certificate(tmp_path, *valid)
    with pytest.raises(ConfigError, match=rf"--certificate: .*{said}.*the clock of this machine says"):
        Tls(files.shown, files.key)


def test_certificate_and_key_may_lie_in_one_file(tmp_path: Path) -> None:
    """One PEM file with both, as some tools write it, needs no second option; its end is known."""
    files = certificate(tmp_path)
    files.key.write_text(files.shown.read_text() + files.key.read_text())
    assert Tls(files.key).expires_at == 4070908800  # 2099-01-01


def test_strangers_who_begin_no_handshake_keep_nobody_out(
    tmp_path: Path, shown: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more silent connections than there is room for, pages are served over https as ever."""
    monkeypatch.setattr("studio_worker.local_studio.server.MAX_CONNECTIONS", 8)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(shown.authority))
    door = Door(tls=Tls(shown.shown, shown.key))
    with LocalStudio(tmp_path / "studio.sqlite3", door=door) as studio:
        silent = [socket.create_connection(("127.0.0.1", studio.port), WAIT_S) for _ in range(40)]
        assert requests.get(f"{studio.base_url}/page/icon.svg", timeout=WAIT_S).status_code == 200
        assert len(silent) - len(select.select(silent, [], [], 0)[0]) <= 8
        for each in silent:
            each.close()


def test_flood_of_connections_without_a_handshake_writes_one_line(
    tmp_path: Path, shown: Certificate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Strangers who begin no handshake fill the log no more than those of plain http do."""
    monkeypatch.setattr("studio_worker.local_studio.server.MAX_CONNECTIONS", 8)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(shown.authority))
    for limit in logging.getLogger(Visit.__module__).filters:
        assert isinstance(limit, Seldom)
        monkeypatch.setattr(limit, "_counts", {})
    door = Door(tls=Tls(shown.shown, shown.key))
    with LocalStudio(tmp_path / "studio.sqlite3", door=door) as studio, caplog.at_level(logging.WARNING):
        silent = [socket.create_connection(("127.0.0.1", studio.port), WAIT_S) for _ in range(40)]
        assert requests.get(f"{studio.base_url}/page/icon.svg", timeout=WAIT_S).status_code == 200
        for each in silent:
            each.close()
    assert [record.getMessage() for record in caplog.records if "too many" in record.getMessage()] == [
        "too many connections; the one that was waited for longest is closed"
    ]


def test_request_that_comes_with_the_end_of_the_handshake_is_answered(studio: LocalStudio) -> None:
    """A client that sends its request in one piece with its last word of the handshake is heard."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(came, goes)
    with socket.create_connection(("127.0.0.1", studio.port), WAIT_S) as plain:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                plain.sendall(goes.read())
                came.write(plain.recv(1 << 16))
        client.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        plain.sendall(goes.read())
        said = b""
        while b"live" not in said:
            came.write(plain.recv(1 << 16))
            with contextlib.suppress(ssl.SSLWantReadError):
                said += client.read()
    assert said.startswith(b"HTTP/1.1 200")


def test_handshake_that_does_not_come_is_not_waited_for(
    studio: LocalStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that says nothing, or half a hello, is closed."""
    monkeypatch.setattr("studio_worker.local_studio.web.handshake.HEAD_S", 0.05)
    for begin in (b"", b"\x16\x03\x01\x02\x00\x01"):
        with socket.create_connection(("127.0.0.1", studio.port), WAIT_S) as silent:
            silent.sendall(begin)
            assert silent.recv(1) == b""


def test_connection_that_is_closed_twice_ends_no_studio(
    studio: LocalStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The web server closes some connections twice; what it asks of them afterwards is answered."""
    came: Queue[tuple[Visit, asyncio.AbstractEventLoop]] = Queue()
    made = Visit.connection_made

    def connection_made(visit: Visit, transport: Any) -> None:
        made(visit, transport)
        came.put((visit, asyncio.get_running_loop()))

    monkeypatch.setattr(Visit, "connection_made", connection_made)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", studio.port), WAIT_S) as plain, context.wrap_socket(plain):
        visit, loop = came.get(timeout=WAIT_S)

        async def close_twice() -> bool:
            visit.transport.close()
            visit.transport.close()
            visit.shutdown()
            waits = visit.waits_since is not None
            visit.drop()
            return waits or visit.is_gone

        assert asyncio.run_coroutine_threadsafe(close_twice(), loop).result(WAIT_S)


def test_renewed_certificate_is_shown_after_sighup(tmp_path: Path) -> None:
    """SIGHUP shows a renewed certificate to the next client; one that is no good leaves the one before."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, second = certificate(tmp_path / "first"), certificate(tmp_path / "second")
    command = [sys.executable, "-m", "studio_worker", "local-studio", "--port", "0"]
    command += ["--data", str(tmp_path / "data"), "--certificate", str(first.shown), "--key", str(first.key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        before = serial_shown(port)
        shutil.copyfile(second.shown, first.shown)
        process.send_signal(signal.SIGHUP)  # the certificate alone: half a renewal
        while "certificate not renewed" not in process.stderr.readline():
            assert process.poll() is None
        assert serial_shown(port) == before
        shutil.copyfile(second.key, first.key)
        process.send_signal(signal.SIGHUP)
        while "certificate renewed" not in process.stderr.readline():
            assert process.poll() is None
        assert serial_shown(port) != before
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0


def test_key_alone_is_a_clear_mistake(tmp_path: Path) -> None:
    """A key without its certificate is refused, not ignored."""
    command = [
        sys.executable,
        "-m",
        "studio_worker",
        "local-studio",
        "--data",
        str(tmp_path),
        "--key",
        "x.pem",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 78
    assert "--key: is the key of no certificate; name its --certificate too" in done.stderr


def test_worker_makes_a_picture_for_a_studio_of_https(
    tmp_path: Path, studio: LocalStudio, site: Path, shown: Certificate
) -> None:
    """The real service registers, fetches an input, works and delivers over https, and `submit` queues there,
    with an authority of one's own.
    """
    environment = {"REQUESTS_CA_BUNDLE": str(shown.authority)}
    with ServiceProcess(site, tmp_path / "log", environment) as running:
        running.await_message("STATUS=ready, connected", READY_S)
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "orange").save(picture, "PNG")
        job_id = queue_synthetic(studio, initImageUrl=studio.add_picture(picture.getvalue()))
        await_status(studio, job_id, "done", "failed")
        assert studio.job(job_id).status == "done"
        assert running.stop() == 0
    command = [sys.executable, "-m", "studio_worker", "submit", "a red potion", "-m", "placeholder"]
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    command += ["--studio", studio.base_url, "--token-file", str(tmp_path / "token")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DONE_S)
    assert (done.returncode, done.stdout.split()[1:]) == (0, ["queued"]), done.stderr


# --- a proxy in front -------------------------------------------------------------------------------

FORWARDED = {
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "studio.example",
    "X-Forwarded-For": "192.0.2.7",
}


@pytest.mark.parametrize(
    ("proxies", "is_believed"),
    [(("127.0.0.1",), True), (("10.0.0.1", "127.0.0.0/8"), True), (("10.0.0.1",), False), ((), False)],
    ids=["address", "network", "another's", "none"],
)
def test_proxy_is_believed_only_where_it_was_named(
    tmp_path: Path, proxies: tuple[str, ...], is_believed: bool
) -> None:
    """Addresses for workers and the login's cookie follow a named proxy's word, and nobody else's."""
    with LocalStudio(tmp_path / "studio.sqlite3", door=Door(token=TOKEN, proxies=proxies)) as studio:
        own = studio.base_url
        state = requests.get(f"{own}/api/state", headers=BEARER | FORWARDED, timeout=WAIT_S)
        assert state.json()["baseUrl"] == ("https://studio.example" if is_believed else own)
        login = requests.post(
            f"{own}/login", data={"token": TOKEN}, headers=FORWARDED, timeout=WAIT_S, allow_redirects=False
        )
        assert ("Secure" in login.headers["Set-Cookie"]) == is_believed
        changed = requests.post(
            f"{own}/login",
            data={"token": TOKEN},
            headers=FORWARDED | {"Origin": "https://studio.example"},
            timeout=WAIT_S,
            allow_redirects=False,
        )
        assert (changed.status_code == 303) == is_believed


def test_worker_behind_a_proxy_is_given_addresses_of_the_proxy(tmp_path: Path) -> None:
    """An offer's inputs are fetched the way the worker came, and its registration counts as its own."""
    door = Door(token=TOKEN, proxies=("127.0.0.1",))
    with LocalStudio(tmp_path / "studio.sqlite3", door=door) as studio:
        machine = Machine(studio).connect(headers=FORWARDED)
        queue(studio, task={"initImageUrl": "/files/x"})
        assert machine.take()["task"]["initImageUrl"] == "https://studio.example/files/x"
        machine.hang_up()
