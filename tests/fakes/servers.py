"""A real HTTP server on loopback that serves files well, or with the faults a test asks for.

The server is faked, never the client: what is tested is what goes over a socket.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

_PIECE = 16 * 1024


@dataclass(frozen=True)
class Asked:
    """One request as it came in; header names in lower case."""

    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass
class ServedFile:
    """One file, and how the server misbehaves with it. Everything may be changed between two requests.

    Attributes:
        etag: ``auto`` makes one from the content, so that a changed file has another.
        last_modified: seconds since the epoch.
        ranges: whether ``Range`` is honoured; without it every answer is a 200 with everything.
        answers: statuses with headers that are given first, one a request.
        redirect: an absolute or relative address that every request is sent to.
        declared_extra: so many bytes more are declared in ``Content-Length`` than are sent.
        no_length: the body ends with the connection.
        chunked: the body is sent in chunks.
        drop_after: every connection is closed after so many bytes of body.
        hold_after: the connection is held after so many bytes of body (0: after the head) until
            :meth:`release` or :meth:`hang_up`; ``held`` is set then.
        hold_head: the connection is held before the answer's first byte.
        drip_head: the head comes a byte at a time, so many seconds apart, and has no end.
        range_shift: ``Content-Range`` names a start that is so much off.
        bare_ranges: a 206 does not repeat the file's validators.
        range_status: what a range is answered with.
        range_cap: a range is answered with at most so many bytes.
        flip_at: the byte at this offset is sent wrong.
        rate: every connection gets so many bytes a second.
        range_answers: as ``answers``, for requests of a range alone.
        hold_request: the request with this number (from 0) is held before its answer's first byte.
        hold_every: one request of so many is held in this way, beginning with the first.
        extra_headers: sent with every 200 and 206.
        repeated: every header is sent twice.
        on_request: called before each answer with the number of earlier requests.
    """

    url: str
    content: bytes
    etag: str | None = "auto"
    last_modified: float | None = None
    ranges: bool = True
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    redirect: str | None = None
    declared_extra: int = 0
    no_length: bool = False
    chunked: bool = False
    drop_after: int | None = None
    hold_after: int | None = None
    hold_head: bool = False
    drip_head: float | None = None
    range_shift: int = 0
    bare_ranges: bool = False
    range_status: int = 206
    range_cap: int | None = None
    flip_at: int | None = None
    rate: float | None = None
    range_answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    hold_request: int | None = None
    hold_every: int | None = None
    extra_headers: dict[str, str] = field(default_factory=dict)
    repeated: bool = False
    on_request: Callable[[int], None] | None = None

    requests: list[Asked] = field(default_factory=list)
    bytes_sent: int = 0
    """Of the file itself."""
    held: threading.Event = field(default_factory=threading.Event)
    pause: threading.Event = field(default_factory=threading.Event)
    """Set at the end alone: what a slow connection waits on."""
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _hangs_up: bool = False
    _released: threading.Event = field(default_factory=threading.Event)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def release(self) -> None:
        """Let every held connection go on, now and later."""
        self._released.set()

    def hang_up(self) -> None:
        """Close every held connection; later ones are not held."""
        self._hangs_up = True
        self._released.set()

    def hold(self) -> None:
        """Called by a connection that has come to where it is to be held."""
        if self._released.is_set():
            return
        self.held.set()
        self._released.wait()
        if self._hangs_up:
            raise ConnectionAbortedError

    def count(self, sent: int) -> None:
        with self._counting:
            self.bytes_sent += sent

    def current_etag(self) -> str | None:
        return f'"{self.sha256[:16]}"' if self.etag == "auto" else self.etag


class Crowd:
    """How many are there at once."""

    def __init__(self) -> None:
        self.most = self._now = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


class FileServer:
    """Serves files on a free port of 127.0.0.1; a context manager. ``crowd`` counts connections."""

    def __init__(self) -> None:
        self._files: dict[str, ServedFile] = {}
        self._scheme = "http"
        files = self._files

        self.crowd = crowd = Crowd()

        class Handler(_Handler):
            served = files
            present = crowd

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def serve(self, path: str, content: bytes, **faults: Any) -> ServedFile:
        """Serve ``content`` under ``path``; ``faults`` are attributes of :class:`ServedFile`."""
        file = ServedFile(url=f"{self._scheme}://127.0.0.1:{self.port}{path}", content=content, **faults)
        self._files[path] = file
        return file

    def use_tls(self, certificate: Path, key: Path) -> None:
        """Speak TLS; call before :meth:`serve`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        # The handshake is for the connection's own thread, not for the one that accepts.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._scheme = "https"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.release()
            file.pause.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: dict[str, ServedFile]
    present: Crowd
    times = 1
    """So often is each header sent."""

    def setup(self) -> None:
        super().setup()
        # What waits in buffers counts as sent: not much of it, whatever the client leaves unread.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)

    def do_GET(self) -> None:
        self.close_connection = True
        file = self.served.get(self.path.partition("?")[0])
        if file is None:
            self._head(404, {"Content-Length": "0"})
            return
        self.times = 2 if file.repeated else 1
        earlier = len(file.requests)
        file.requests.append(Asked(self.path, {name.lower(): value for name, value in self.headers.items()}))
        if file.on_request is not None:
            file.on_request(earlier)
        # Whoever was cancelled or killed has closed the connection.
        with contextlib.suppress(ConnectionError), self.present.joined():
            is_next = file.hold_every is not None and earlier % file.hold_every == 0
            if file.hold_head or earlier == file.hold_request or is_next:
                file.hold()
            if file.drip_head is not None:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
                while not file.pause.wait(file.drip_head):
                    self.wfile.write(b"x")
            self._answer(file)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _answer(self, file: ServedFile) -> None:
        if file.answers:
            status, headers = file.answers.pop(0)
            self._head(status, {"Content-Length": "0", **headers})
        elif file.range_answers and "Range" in self.headers:
            status, headers = file.range_answers.pop(0)
            self._head(status, {"Content-Length": "0", **headers})
        elif file.redirect is not None:
            self._head(302, {"Location": file.redirect, "Content-Length": "0"})
        else:
            self._send_file(file)

    def _send_file(self, file: ServedFile) -> None:
        content, whole = file.content, len(file.content)
        headers = dict(file.extra_headers)
        if (etag := file.current_etag()) is not None:
            headers["ETag"] = etag
        if file.last_modified is not None:
            headers["Last-Modified"] = email.utils.formatdate(file.last_modified, usegmt=True)
        start = self._first_byte(file, headers)
        if start is not None and start >= whole:
            self._head(416, {"Content-Range": f"bytes */{whole}", "Content-Length": "0"})
            return
        first = start or 0
        last = whole if start is None else self._end_byte(file)
        if start is not None and file.range_cap is not None:
            last = min(last, first + file.range_cap)
        if start is not None and file.bare_ranges:
            headers = dict(file.extra_headers)
        if start is not None:
            headers["Content-Range"] = f"bytes {first + file.range_shift}-{last - 1}/{whole}"
        if file.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif not file.no_length:
            headers["Content-Length"] = str(last - first + file.declared_extra)
        self._head(200 if start is None else file.range_status, headers)
        body = bytearray(content[first:last])
        if file.flip_at is not None and first <= file.flip_at < last:
            body[file.flip_at - first] ^= 0xFF
        self._send_body(file, bytes(body))

    def _first_byte(self, file: ServedFile, headers: dict[str, str]) -> int | None:
        """Where the answer starts, or ``None`` for everything (no range, or one that is not honoured)."""
        asked = self.headers.get("Range", "")
        if not file.ranges or not asked.startswith("bytes="):
            return None
        condition = self.headers.get("If-Range")
        if condition is not None and condition not in {headers.get("ETag"), headers.get("Last-Modified")}:
            return None
        return int(asked.removeprefix("bytes=").partition("-")[0])

    def _end_byte(self, file: ServedFile) -> int:
        """Behind the last byte that was asked for."""
        last = self.headers.get("Range", "").partition("-")[2]
        return min(int(last) + 1, len(file.content)) if last else len(file.content)

    def _send_body(self, file: ServedFile, body: bytes) -> None:
        end = len(body) if file.drop_after is None else min(len(body), file.drop_after)
        hold_at = file.hold_after
        at = 0
        while True:
            if at == hold_at:
                file.hold()
            if at >= end:
                break
            stop = min(at + _PIECE, end)
            if hold_at is not None and at < hold_at:
                stop = min(stop, hold_at)
            piece = body[at:stop]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if file.chunked else piece)
            file.count(len(piece))
            if file.rate is not None:
                file.pause.wait(len(piece) / file.rate)
            at = stop
        if file.chunked and end == len(body):
            self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Connection": "close", **headers}.items():
            for _ in range(self.times):
                self.send_header(name, value)
        self.end_headers()


def free_port() -> int:
    """A port of loopback where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def refused_url(path: str = "/model.gguf") -> str:
    """A loopback address where nothing listens."""
    return f"http://127.0.0.1:{free_port()}{path}"


@contextlib.contextmanager
def raw_server(answer: bytes) -> Iterator[str]:
    """Sends ``answer`` as it is to every connection, then closes it; yields the base URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            with connection, contextlib.suppress(ConnectionError):
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextlib.contextmanager
def black_hole(address: str, port: int) -> Iterator[None]:
    """``address`` takes no connection and refuses none: whoever connects to it waits."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(4):  # the queue is full then: what comes after is dropped without an answer
            filling = held.enter_context(socket.socket(family))
            filling.setblocking(False)
            filling.connect_ex((address, port))
        yield


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Every name has these addresses; an address is itself."""

    def resolved(host: str, port: int | str, *_: Any, **__: Any) -> list[Any]:
        try:
            found = [str(ipaddress.ip_address(host))]
        except ValueError:
            found = list(addresses)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port))) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
