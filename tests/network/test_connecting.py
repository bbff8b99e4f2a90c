"""What downloads promise on networks as they are: dead addresses, late first bytes, early hints, cookies."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker import __version__
from studio_worker.download import download_file
from studio_worker.errors import DownloadError
from studio_worker.network.connecting import Reached
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, black_hole, raw_server, resolve_to

BODY = b"a tiny pretend model"
LARGE = bytes(range(256)) * 70_000
GUARD_S = 20.0
"""Then a test that hangs is ended."""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@contextlib.contextmanager
def given_up_when_it_hangs() -> Iterator[threading.Event]:
    cancel = threading.Event()
    timer = threading.Timer(GUARD_S, cancel.set)
    timer.start()
    try:
        yield cancel
    finally:
        timer.cancel()


@pytest.mark.parametrize("size", [20, 17_000_000])
def test_download_reaches_a_host_one_of_whose_addresses_swallows_everything(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """An address that never answers, as IPv6 on many a network, holds nothing up."""
    file = server.serve("/m", LARGE[:size], rate=10_000_000 if size > 20 else None)
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
    url = f"http://mirror.example:{server.port}/m"

    with black_hole("127.0.0.2", server.port), given_up_when_it_hangs() as cancel:
        policy = Policy(connect_s=600, allow_insecure=True)
        download_file(url, tmp_path / "m", sha256=file.sha256, cancel=cancel, policy=policy)

    assert (tmp_path / "m").read_bytes() == LARGE[:size]


def test_download_names_a_host_that_nobody_answers_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer
) -> None:
    """Where no address answers, the connection is given up after its own time, and that is what is said."""
    resolve_to(monkeypatch, "127.0.0.2")
    url = f"http://mirror.example:{server.port}/m"
    policy = Policy(connect_s=0.2, delays_s=(), allow_insecure=True)

    with (
        black_hole("127.0.0.2", server.port),
        pytest.raises(DownloadError, match="Connection timed out") as failure,
    ):
        download_file(url, tmp_path / "m", policy=policy)

    assert failure.value.reason == "request error"


def test_addresses_are_tried_by_families_in_turn_and_the_one_that_worked_first() -> None:
    """Two dead addresses of one family do not stand before the other family; what works is remembered."""
    found: list[Any] = [
        (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))
        for address in ("2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2")
    ]
    reached = Reached()

    def order() -> list[str]:
        return [entry[4][0] for entry in reached.ordered("host", found)]

    assert order() == ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"]
    reached.note("host", "192.0.2.2")
    assert order()[0] == "192.0.2.2"


@pytest.mark.parametrize("size", [20, 17_000_000])
def test_first_byte_may_come_later_than_the_next_ones(server: FileServer, tmp_path: Path, size: int) -> None:
    """A cache that fetches the file itself first is waited for; only then does silence count."""
    file = server.serve("/m", LARGE[:size], hold_head=True)
    release = threading.Timer(1.0, file.release)
    release.start()

    policy = Policy(stall_s=0.3, first_byte_s=GUARD_S, delays_s=())
    download_file(file.url, tmp_path / "m", sha256=file.sha256, policy=policy)

    assert (tmp_path / "m").read_bytes() == file.content
    assert [asked.range for asked in file.requests].count(None) == 1


def test_first_byte_that_never_comes_is_given_up(server: FileServer, tmp_path: Path) -> None:
    """The wait for the first byte has a limit of its own."""
    file = server.serve("/m", BODY, hold_head=True)

    with pytest.raises(DownloadError, match="TimeoutError"):
        download_file(file.url, tmp_path / "m", policy=Policy(first_byte_s=0.2, delays_s=()))


def test_head_that_drips_is_given_up(server: FileServer, tmp_path: Path) -> None:
    """A head of which a byte comes now and then has the time that its first byte has, and no more."""
    file = server.serve("/m", BODY, drip_head=0.02)

    with given_up_when_it_hangs() as cancel, pytest.raises(DownloadError, match="TimeoutError"):
        download_file(file.url, tmp_path / "m", cancel=cancel, policy=Policy(first_byte_s=0.3, delays_s=()))


def test_body_that_stalls_is_given_up_however_late_a_first_byte_may_be(
    server: FileServer, tmp_path: Path
) -> None:
    """The limit for the first byte is none for the others."""
    file = server.serve("/m", BODY, hold_after=5)

    policy = Policy(first_byte_s=600, stall_s=0.2, delays_s=())
    with given_up_when_it_hangs() as cancel, pytest.raises(DownloadError, match="streaming body"):
        download_file(file.url, tmp_path / "m", cancel=cancel, policy=policy)


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_interim_answers_are_read_past(tmp_path: Path, interim: str) -> None:
    """What comes before the answer is not taken for it."""
    early = f"HTTP/1.1 {interim}\r\nLink: </style.css>; rel=preload\r\n\r\n".encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)

    with raw_server(early + early + head + BODY) as url:
        download_file(f"{url}/m", tmp_path / "m", policy=Policy(delays_s=()))

    assert (tmp_path / "m").read_bytes() == BODY


def test_interim_answers_without_an_end_are_given_up(tmp_path: Path) -> None:
    """A server that never comes to the point is an error, not a loop."""
    with (
        raw_server(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 2000) as url,
        pytest.raises(DownloadError),
    ):
        download_file(f"{url}/m", tmp_path / "m", policy=Policy(delays_s=()))


def test_downloads_say_who_asks(server: FileServer, tmp_path: Path) -> None:
    """Hosts that turn libraries away, or look into their logs, see this worker and its version."""
    file = server.serve("/m", BODY)

    download_file(file.url, tmp_path / "m")

    assert file.requests[0].headers["user-agent"] == f"studio-worker/{__version__}"


@pytest.mark.parametrize("query", ["k=%7e%2fA+b&s=a~b*(c)!%20", "sig=%E2%82%ac;x=[1]", "%"])
def test_signed_address_is_sent_byte_for_byte(server: FileServer, tmp_path: Path, query: str) -> None:
    """What a signature was made of arrives as it was given, on redirects too."""
    file = server.serve("/m", BODY, answers=[(302, {"Location": f"/m?two&{query}"})])

    download_file(f"{file.url}?{query}", tmp_path / "m")

    assert [asked.path for asked in file.requests] == [f"/m?{query}", f"/m?two&{query}"]


def test_cookie_of_a_redirect_goes_along_it(server: FileServer, tmp_path: Path) -> None:
    """A host that wants its cookie back gets it."""
    wall = (302, {"Location": "/m", "Set-Cookie": "gate=1; Path=/"})
    file = server.serve("/m", BODY, answers=[wall])

    download_file(file.url, tmp_path / "m", sha256=hashlib.sha256(BODY).hexdigest())

    assert [asked.headers.get("cookie") for asked in file.requests] == [None, "gate=1"]


def test_process_without_threads_left_says_so(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started the reason is told with its cure."""
    file = server.serve("/m", BODY)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(DownloadError, match="TasksMax"):
        download_file(file.url, tmp_path / "m", policy=Policy(delays_s=()))


def test_download_does_with_the_threads_that_there_are(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that gets no thread leaves its piece to the others."""
    file = server.serve("/m", LARGE, rate=20_000_000)
    start = threading.Thread.start
    ranges: list[threading.Thread] = []

    def once(thread: threading.Thread) -> None:
        if thread.name == "download-range":
            ranges.append(thread)
            if len(ranges) > 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", once)
    download_file(file.url, tmp_path / "m", sha256=file.sha256, policy=Policy(delays_s=()))

    assert (tmp_path / "m").read_bytes() == LARGE


@pytest.mark.parametrize("lengths", [b"20\r\nContent-Length: 20", b"20, 20", b"20\r\nContent-Length: 21"])
def test_length_that_is_said_twice_is_one(tmp_path: Path, lengths: bytes) -> None:
    """The same Content-Length twice is one; where the two differ nobody knows when the file is whole."""
    policy = Policy(delays_s=())
    with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n%s" % (lengths, BODY)) as url:
        if b"21" not in lengths:
            download_file(f"{url}/m", tmp_path / "m", policy=policy)
            assert (tmp_path / "m").read_bytes() == BODY
        else:
            with pytest.raises(DownloadError):
                download_file(f"{url}/m", tmp_path / "m", policy=policy)
            assert not (tmp_path / "m").exists()


def test_headers_that_are_said_twice_are_one(server: FileServer, tmp_path: Path) -> None:
    """Where a proxy repeats whatever the server says, redirects are followed and a broken file is resumed."""
    file = server.serve("/m", LARGE[:200_000], repeated=True, drop_after=70_000)
    moved = server.serve("/moved", b"", repeated=True, redirect="/m")

    download_file(moved.url, tmp_path / "m", policy=Policy(delays_s=(0.0,)))

    assert (tmp_path / "m").read_bytes() == file.content
    assert file.bytes_sent == len(file.content)


@pytest.mark.parametrize("is_hash_known", [True, False])
def test_range_that_comes_as_a_form_is_never_in_the_file(tmp_path: Path, is_hash_known: bool) -> None:
    """A range that comes as one part of a form is not taken for the file's bytes; the file comes whole."""
    ranges: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            ranges.append(asked)
            if asked is None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(BODY)))
                self.send_header("ETag", '"one"')
                self.end_headers()
                self.wfile.write(BODY[:7] if len(ranges) == 1 else BODY)  # the first one breaks off
                return
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            part = b"--x\r\nContent-Range: bytes %d-%d/%d\r\n\r\n" % (first, len(BODY) - 1, len(BODY))
            form = part + BODY[first:] + b"\r\n--x--\r\n"
            self.send_response(206)
            self.send_header("Content-Type", "multipart/byteranges; boundary=x")
            self.send_header("Content-Length", str(len(form)))
            self.end_headers()
            self.wfile.write(form)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    sha256 = hashlib.sha256(BODY).hexdigest() if is_hash_known else None
    try:
        url = f"http://127.0.0.1:{server.server_port}/m"
        download_file(url, tmp_path / "m", sha256=sha256, policy=Policy(delays_s=(0.0,) * 3))
    finally:
        server.shutdown()
        server.server_close()

    assert (tmp_path / "m").read_bytes() == BODY
    assert ranges[0] is None
    assert ranges[-1] is None


@pytest.mark.parametrize("no_length", [False, True])
def test_file_of_no_bytes_is_a_file(server: FileServer, tmp_path: Path, no_length: bool) -> None:
    """A file that holds nothing is downloaded as that."""
    file = server.serve("/m", b"", no_length=no_length)

    download_file(file.url, tmp_path / "m", sha256=file.sha256, policy=Policy(delays_s=()))

    assert (tmp_path / "m").read_bytes() == b""


FEW_DESCRIPTORS = """
import resource, sys
from pathlib import Path
from studio_worker.download import Policy, download_file
held = [open(0, closefd=False) for _ in range(3)]
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
download_file(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3], policy=Policy(delays_s=(0.1,)))
"""


def test_download_does_with_few_descriptors(server: FileServer, tmp_path: Path) -> None:
    """Where the system gives a process hardly any open file, a download has fewer connections, and comes."""
    file = server.serve("/m", LARGE, rate=8_000_000)

    child = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS, file.url, str(tmp_path / "m"), file.sha256],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (child.returncode, child.stderr) == (0, "")
    assert (tmp_path / "m").read_bytes() == LARGE
