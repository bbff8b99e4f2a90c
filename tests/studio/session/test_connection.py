"""What can go wrong on the way to the studio, over real sockets: names, TLS, proxies, sleep, bad frames."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from websockets.sync.server import serve

from studio_worker.errors import (
    ConfigError,
    DuplicateWorker,
    ProtocolError,
    RefusedByStudio,
    StudioUnavailable,
)
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.route import route_to
from studio_worker.studio.session.connection import MAX_FRAME_BYTES, explain, now_s, opened, watch
from studio_worker.studio.session.protocol import SessionProtocol
from tests.fakes import certificates
from tests.fakes.scripted import LIMIT_S, ScriptedHttp, ScriptedStudio
from tests.fakes.servers import black_hole, resolve_to
from tests.lab.frames import CAPABILITIES_JSON, CLAIM
from tests.lab.session import FAST, Running
from tests.lab.worker import delivery

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXY_VARIABLES, *(name.upper() for name in PROXY_VARIABLES), *CA_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def fail_to_connect(url: str, timeout_s: float = LIMIT_S) -> ProtocolError:
    """What the session makes of a connection to ``url`` that does not come about."""
    api = StudioApi(url)
    with pytest.raises(Exception) as caught:  # noqa: PT011  (whatever the library raises is the point)
        asyncio.run(opened(api.session_url("w1"), api.route, "token", timeout_s))
    return explain(caught.value)


# --- failures on connect, each with its reason and what to look at ---


def test_connection_to_a_name_that_does_not_exist_says_so() -> None:
    """A failing DNS is named, and may pass."""
    error = fail_to_connect("http://studio.invalid")
    assert type(error) is ProtocolError
    assert "name cannot be resolved" in str(error)


def test_connection_to_a_closed_port_says_so() -> None:
    """A studio that does not run is a refused connection, and may pass."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "Connect call failed" in str(fail_to_connect(f"http://127.0.0.1:{port}"))


def test_connection_that_is_never_answered_is_given_up() -> None:
    """A studio that takes the connection and says nothing is given up after the time limit."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        error = fail_to_connect(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2)
    assert "did not answer in time" in str(error)


def test_connection_reaches_a_studio_one_of_whose_addresses_swallows_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken IPv6 before a good IPv4 address does not keep the session from opening."""
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with black_hole("127.0.0.2", port):
            error = fail_to_connect(f"http://studio.example:{port}", timeout_s=1.0)
            listener.settimeout(0)
            listener.accept()[0].close()  # it has come through
    assert "did not answer in time" in str(error)


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (401, RefusedByStudio, "register --reset"),
        (403, ProtocolError, "firewall or proxy"),
        (404, ProtocolError, "api_base_url"),
        (301, ProtocolError, "redirects are not followed"),
        (500, ProtocolError, "HTTP 500"),
        (503, ProtocolError, "HTTP 503"),
    ],
)
def test_refused_upgrade_says_what_to_look_at(status: int, kind: type[Exception], text: str) -> None:
    """Only 401 is final; what else a web server says leads to another try, with a hint."""
    with ScriptedStudio(refuse_with=status) as studio:
        error = fail_to_connect(studio.url)
    assert type(error) is kind
    assert text in str(error)


def test_answer_that_is_no_websocket_says_so() -> None:
    """A web server that knows no upgrade, or no HTTP at all, is an error of one line that may pass."""
    with ScriptedHttp((200, {}, {})) as server:
        assert "no session" in str(fail_to_connect(server.url))


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of localhost that nobody knows, with its key beside it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem"


@contextlib.contextmanager
def tls_studio(certificate: Path) -> Iterator[str]:
    """A studio behind TLS: WebSockets are taken, and so is any upload."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))

    def answer(connection: object, request: object) -> object:
        if "Upgrade" in request.headers:  # type: ignore[attr-defined]
            return None
        return connection.respond(404, "no\n")  # type: ignore[attr-defined]

    server = serve(
        lambda connection: connection.recv(), "127.0.0.1", 0, ssl=context, process_request=answer,  # type: ignore[arg-type]
        subprotocols=["studio-worker-v1"],  # type: ignore[list-item]
    )  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://localhost:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()


def test_unknown_certificate_says_what_to_install(certificate: Path) -> None:
    """A certificate of an unknown authority is refused, with the cure, by session and HTTP calls alike."""
    with tls_studio(certificate) as url:
        error = fail_to_connect(url)
        with pytest.raises(StudioUnavailable) as caught:
            StudioApi(url).poll("r", "secret")
    assert type(error) is ProtocolError
    assert "certificate is not trusted" in str(error)
    assert "update-ca-certificates" in str(error)
    assert "ertificate" in str(caught.value)


@pytest.mark.parametrize(
    ("valid", "said"),
    [
        (("20200101000000Z", "20210101000000Z"), "has expired"),
        (("20900101000000Z", "20910101000000Z"), "is not yet valid"),
    ],
    ids=["ended", "future"],
)
def test_certificate_of_another_time_names_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, valid: tuple[str, str], said: str
) -> None:
    """A certificate that has ended or is not valid yet is told as such, with this box's clock."""
    made = certificates.certificate(tmp_path, *valid)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.authority))
    shown = tmp_path / "cert.pem"
    assert shown == made.shown
    with tls_studio(shown) as url:
        url = url.replace("localhost", "127.0.0.1")
        error = fail_to_connect(url)
        with pytest.raises(StudioUnavailable) as caught:
            StudioApi(url).poll("r", "secret")
    for text in (str(error), str(caught.value)):
        assert said in text
        assert "the clock of this machine says 20" in text
        assert "update-ca-certificates" not in text


@pytest.mark.parametrize("variable", CA_VARIABLES)
def test_own_authority_is_trusted_by_session_and_calls_alike(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A studio with a certificate of one's own is reached in both ways once the bundle is named."""
    monkeypatch.setenv(variable, str(certificate))
    with tls_studio(certificate) as url:
        api = StudioApi(url)

        async def connect() -> None:
            await (await opened(api.session_url("w1"), api.route, "token", LIMIT_S)).close()

        asyncio.run(connect())
        with pytest.raises(Exception, match="404"):
            api.poll("r", "secret")


def test_bundle_that_is_missing_is_a_mistake_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path in the environment ends the start with a cure, not in a loop of failing connections."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(ConfigError, match=r"/nowhere/ca\.pem.*SSL_CERT_FILE"):
        StudioApi("https://studio.example")


def test_plain_http_to_a_tls_port_is_an_error_of_one_line(certificate: Path) -> None:
    """Whoever writes http for https, or the other way round, reads which of the two went wrong."""
    with ScriptedHttp() as server:
        assert "no encrypted connection" in str(fail_to_connect(server.url.replace("http:", "https:")))


# --- proxies ---


class Proxy(http.server.ThreadingHTTPServer):
    """A proxy that notes what it is asked for, and refuses everything with ``status``."""

    def __init__(self, status: int) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                outer.asked.append(f"{self.command} {self.path}")
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_CONNECT = do_GET = do_POST = answer

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://user:secret@127.0.0.1:{self.server_port}"


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy(407) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy"])
def test_proxy_of_the_environment_is_used_by_session_and_calls_alike(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Both go through the proxy, say that it refused, and never show its password."""
    monkeypatch.setenv(variable, proxy.url)
    error = fail_to_connect("https://studio.example")
    with pytest.raises(StudioUnavailable) as caught:
        StudioApi("https://studio.example").poll("r", "secret-of-r")
    assert proxy.asked == ["CONNECT studio.example:443"] * 2
    assert "proxy answered HTTP 407" in str(error)
    assert "secret" not in f"{error} {caught.value}"


@pytest.mark.parametrize(
    ("url", "no_proxy"),
    [
        ("http://127.0.0.1:9", ""),
        ("http://localhost:9", ""),
        ("http://[::1]:9", ""),
        ("https://studio.example", "studio.example"),
        ("https://studio.example", ".example"),
        ("https://10.1.2.3", "10.0.0.0/8"),
        ("https://studio.example", "*"),
    ],
)
def test_proxy_is_not_used_for_this_machine_and_for_what_is_excepted(
    monkeypatch: pytest.MonkeyPatch, url: str, no_proxy: str
) -> None:
    """Loopback is never proxied, whatever the environment says; no_proxy is heeded."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert route_to(url).proxy is None


def test_proxy_of_an_unusable_kind_is_a_mistake_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SOCKS proxy ends the start with a cure; half of the worker would get no further with it."""
    monkeypatch.setenv("all_proxy", "socks5://proxy.example:1080")
    with pytest.raises(ConfigError, match=r"socks5.*https_proxy"):
        StudioApi("https://studio.example")


def test_netrc_does_not_replace_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A netrc entry for the studio's host changes nothing: the worker signs in with its own token."""
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with ScriptedHttp((200, {}, {"status": "pending"}), (200, {}, {"requestId": "r"})) as server:
        StudioApi(server.url).poll("r", "secret-of-r")
    assert server.heard[0].headers["authorization"] == "Bearer secret-of-r"


# --- answers without end ---


def test_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A studio whose answer does not end costs neither memory nor the registration."""
    with ScriptedHttp((200, {}, b"x" * 3_000_000)) as server, pytest.raises(StudioUnavailable):
        StudioApi(server.url).poll("r", "secret")


def test_upload_over_a_slow_line_takes_as_long_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is limited is silence, not the whole upload: a slow line delivers too."""
    monkeypatch.setattr("studio_worker.studio.http.transport._TIMEOUT_S", (0.5, 20.0))
    read = threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            left = int(self.headers["Content-Length"])
            while left:
                left -= len(self.rfile.read(min(left, 1_000_000)))
                read.wait(0.2)  # never set: so slow is this line
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    made = delivery(tmp_path)
    assert made.data_path is not None
    made.data_path.write_bytes(b"x" * 16_000_000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        StudioApi(f"http://127.0.0.1:{server.server_port}").upload("w", "t", made)
        server.shutdown()


# --- what a connection may bring ---


@pytest.mark.parametrize(
    ("code", "kind"), [(4001, RefusedByStudio), (4003, DuplicateWorker), (4004, RefusedByStudio)]
)
def test_final_close_before_welcome_is_final_too(code: int, kind: type[Exception]) -> None:
    """A studio may close for good at the hello already."""
    with ScriptedStudio() as studio:
        running = Running(studio)
        conversation = studio.accept()
        conversation.receive()
        conversation.close(code, "no")
        assert isinstance(running.end(), kind)


def test_frame_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    """A prompt of ten megabytes is told as too long, and no reason to lose the session."""
    with ScriptedStudio() as studio:
        running = Running(studio)
        conversation = studio.accept()
        conversation.welcome()
        task = {**CLAIM["task"], "prompt": "p" * 10_000_000}
        conversation.send(type="offer", claim={**CLAIM, "task": task})
        assert conversation.receive_type("accept")["jobId"] == "j1"
        assert "prompt: has 10000000 bytes" in conversation.receive_type("fail")["error"]
        running.stop()
        assert running.end() is None


@pytest.mark.parametrize(
    ("message", "code"),
    [("x" * (MAX_FRAME_BYTES + 1), 1009), (b"\xff\xfe", 1007)],
    ids=["too big", "no UTF-8"],
)
def test_frame_beyond_the_protocol_closes_with_its_code(message: str | bytes, code: int) -> None:
    """A frame that is too big, or text that is no UTF-8, closes this connection; the next one is tried."""
    with ScriptedStudio() as studio:
        running = Running(studio)
        conversation = studio.accept()
        conversation.welcome()
        conversation.receive_type("heartbeat")
        conversation.send_raw(message) if isinstance(message, str) else conversation.send_bad_text(message)
        assert conversation.closed_with() == code
        studio.accept().welcome()
        running.stop()
        assert running.end() is None


def test_deep_nesting_is_dropped() -> None:
    """A claim nested ten thousand deep is no offer, and no crash."""
    with ScriptedStudio() as studio:
        running = Running(studio)
        conversation = studio.accept()
        conversation.welcome()
        conversation.send_raw(
            '{"type":"offer","claim":{"jobId":"j0","x":' + "[" * 10_000 + "]" * 10_000 + "}}"
        )
        conversation.send(type="offer", claim=CLAIM)
        assert conversation.receive_type("accept")["jobId"] == "j1"
        running.stop()
        assert running.end() is None


def test_hello_is_what_the_protocol_says() -> None:
    """Path, bearer, sub-protocol, user agent and the first frame, byte for byte in names and shapes."""
    with ScriptedStudio() as studio:
        running = Running(studio)
        conversation = studio.accept()
        assert conversation.path == "/graphics/api/workers/w1/connect"
        assert conversation.receive() == {
            "type": "hello",
            "authToken": "token-of-w1",
            "capabilities": CAPABILITIES_JSON,
        }
        running.stop()
        assert running.end() is None


# --- time ---


class Clock:
    """The machine's clock: it moves by what a test says at each look."""

    def __init__(self, *steps: float) -> None:
        self._steps = list(steps)
        self.now = 100.0

    def __call__(self) -> float:
        self.now += self._steps.pop(0) if self._steps else 0.01
        return self.now


def verdict(protocol: SessionProtocol, clock: Clock) -> str:
    """What the watch over a silent connection says, within ten of its ticks."""

    async def watched() -> str:
        try:
            async with asyncio.timeout(0.15):
                await watch(protocol, 0.04, clock)
        except TimeoutError:
            return "alive"
        except ProtocolError as error:
            return str(error)
        return "ended"

    return asyncio.run(watched())


def test_connection_that_died_in_a_sleep_is_given_up_right_after_it() -> None:
    """A machine that slept for an hour does not wait for the whole limit again."""
    protocol = SessionProtocol(100.0, dead_peer_s=0.04)
    protocol.dead_at = 120.0
    assert "no frame from the studio" in verdict(protocol, Clock(0.0, 0.01, 3600.0, 0.01))


def test_machine_that_was_held_up_reads_before_it_judges() -> None:
    """After a pause of the process frames may lie unread: a late tick alone gives no verdict."""
    protocol = SessionProtocol(100.0, dead_peer_s=0.04)
    protocol.dead_at = 120.0

    class Reading(Clock):
        def __call__(self) -> float:
            now = super().__call__()
            if now > 3000:
                protocol.dead_at = now + 20.0  # the reader has found the studio's frames
            return now

    assert verdict(protocol, Reading(0.0, 0.01, 3600.0, 0.01)) == "alive"


def test_clock_of_the_session_is_no_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting the machine's clock makes no connection dead, and none immortal."""
    before = now_s()
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert before <= now_s() < before + 60.0


def test_studio_gone_for_an_hour_is_found_again() -> None:
    """Two minutes of tries are as good as an hour's: the session is back as soon as the studio is."""
    with ScriptedStudio(refuse_with=503, refusals=130) as studio:  # an hour at 30 s is 120
        running = Running(studio, timings=replace(FAST, backoff_base_s=0.001, backoff_cap_s=0.002))
        studio.accept().welcome()
        assert studio.refused == 130
        running.stop()
        assert running.end() is None
