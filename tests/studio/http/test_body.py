"""What an upload sends comes from the picture's file while it is sent, whole and in order."""

from __future__ import annotations

import contextlib
import errno
import io
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from studio_worker.spool.delivery import Delivery
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.body import Body
from tests.lab.worker import delivery

SIZE_BYTES = 64_000_000


@contextlib.contextmanager
def swallowing(heard: list[int]) -> Iterator[str]:
    """The address of a studio that takes an upload and keeps no more than its length, which it notes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            left = int(self.headers["Content-Length"])
            heard.append(left)
            while left and (piece := self.rfile.read(min(left, 65536))):
                left -= len(piece)
            if not left:
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_upload_takes_no_memory_for_the_picture(tmp_path: Path) -> None:
    """However large a picture is, an upload has a small piece of it in memory at a time."""
    large, heard = delivery(tmp_path), list[int]()
    assert large.data_path is not None
    with large.data_path.open("r+b") as file:
        file.truncate(SIZE_BYTES)
    with swallowing(heard) as url:
        tracemalloc.start()
        try:
            StudioApi(url).upload("w", "t", large)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert heard[0] > SIZE_BYTES
    assert peak_bytes < SIZE_BYTES / 20


class Failing(io.BytesIO):
    """A file whose disk fails after its first piece, or that ends there."""

    def __init__(self, ends: bool) -> None:
        super().__init__(b"x" * 1_000_000)
        self._ends = ends

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() and self._ends:
            return b""
        if self.tell():
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


@pytest.mark.parametrize("ends", [False, True], ids=["fails", "ends"])
def test_picture_that_cannot_be_read_to_its_end_is_no_trouble_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """A disk that fails in the middle of an upload is told as that, and not as a studio that is away."""
    monkeypatch.setattr(Delivery, "opened", lambda self: Failing(ends))
    with swallowing([]) as url, pytest.raises(OSError, match=r"error|shorter") as caught:
        StudioApi(url).upload("w", "t", delivery(tmp_path))
    assert caught.value.errno == errno.EIO


def test_body_is_its_parts_in_order_as_often_as_it_is_sent() -> None:
    """Bytes and files come one after the other, also the second time, and the end is told each time."""
    sent = list[bool]()
    body = Body([b"head", io.BytesIO(b"picture"), b"tail"], lambda: sent.append(True))
    for _ in range(2):
        assert not body.is_sent()
        assert b"".join(body) == b"headpicturetail"
        assert body.is_sent()
        assert body.tell() == body.len == 15
        body.seek(0)
    assert sent == [True, True]
    with pytest.raises(io.UnsupportedOperation):
        body.seek(3)
