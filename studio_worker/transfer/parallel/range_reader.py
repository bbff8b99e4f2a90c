"""One connection's work: takes a piece of the file, asks for it, writes what comes to its place, goes on.

Runs in a thread of its own. What it may take, and when it must stop, is ranges.py's to say.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from studio_worker.context import carried
from studio_worker.errors import DownloadError
from studio_worker.transfer.answer import CHUNK_BYTES, Body, Connection
from studio_worker.transfer.asking import Target
from studio_worker.transfer.parallel.pace import Work
from studio_worker.transfer.policy import Policy
from studio_worker.transfer.staging import Staged


class FileChanged(DownloadError):
    """The server's file is not the one whose bytes are kept."""

    def __init__(self, name: str) -> None:
        super().__init__("streaming body", f"GET {name}: streaming body: the file has changed on the server")


class RangesIgnored(DownloadError):
    """The server answers a range with something else."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__("streaming body", f"GET {name}: streaming body: {message}")


class Pieces(Protocol):
    """Where a reader gets its work."""

    total: int
    validator: str | None

    def take(self, reader: RangeReader) -> bool:
        """Give ``reader`` another piece; whether there is one for it."""

    def extend(self, reader: RangeReader) -> bool:
        """Let ``reader`` go on behind its piece; whether it may."""

    def ended(self, reader: RangeReader, error: Exception | None) -> None:
        """``reader`` is done, or broken."""


class RangeReader:
    """One connection. ``at`` and ``end`` are the rest of its piece; ``lock`` guards them and ``is_left``."""

    def __init__(self, target: Target, policy: Policy, staged: Staged, pieces: Pieces) -> None:
        self.target = target
        self.policy = policy
        self.lock = threading.Lock()
        self.at = self.end = 0
        self.is_open = False
        """Whether the answer goes on behind the piece."""
        self.received = 0
        self.moved_at = time.monotonic()
        """When the last byte came, or the answer's head, or the request went out."""
        self.is_answered = False
        self.busy_s = 0.0
        """CPU seconds so far."""
        self.reads = self.late_reads = 0
        """How often it read, and how often more was there by then than one read takes."""
        self.first_byte_s = 0.0
        self.is_delivering = False
        self.left = threading.Event()
        self.mark = (self.moved_at, 0)
        self._staged = staged
        self._pieces = pieces

    @property
    def patience_s(self) -> float:
        """How long it may be silent as things stand: connecting, and waiting for an answer, is no silence."""
        policy = self.policy
        return policy.stall_s if self.is_answered else policy.connect_s + policy.first_byte_s

    def rate(self, now: float) -> float:
        """Bytes a second since the last mark."""
        since, before = self.mark
        return (self.received - before) / max(now - since, 0.001)

    def start(self, body: Body | None = None) -> None:
        """Begin, with the answer that is there already where there is one."""
        threading.Thread(target=carried(self._work), args=(body,), name="download-range", daemon=True).start()

    def leave(self) -> None:
        """Nothing is written any more when this returns; the thread ends with its next bytes."""
        self.left.set()
        with self.lock:
            pass

    def _work(self, body: Body | None) -> None:
        connection = Connection(self.policy)
        self.is_answered = body is not None
        error: Exception | None = None
        try:
            while body or self.at < self.end or (not self.left.is_set() and self._pieces.take(self)):
                self._fetch(connection, body)
                body = None
                if self.left.is_set():
                    break
        except Exception as problem:
            error = problem
        finally:
            connection.close()
            self._pieces.ended(self, error)

    def _fetch(self, connection: Connection, body: Body | None) -> None:
        """The whole piece; asks again where a connection broke after it had brought something."""
        while True:
            before = self.received
            try:
                self._receive(body or self._ask(connection))
                error = None
            except DownloadError as problem:
                if problem.reason != "streaming body" or isinstance(problem, FileChanged | RangesIgnored):
                    raise
                error = problem
            body = None
            self.is_delivering = False
            if self.left.is_set() or self.at >= self.end:
                return
            if self.received == before:
                raise error or DownloadError(
                    "streaming body",
                    f"GET {self.target.name}: streaming body: {self._staged.kept} of "
                    f"{self._pieces.total} bytes arrived",
                )

    def _ask(self, connection: Connection) -> Body:
        self.is_answered = False
        self.moved_at = asked_at = time.monotonic()
        end = "" if self.is_open or self.end >= self._pieces.total else str(self.end - 1)
        headers = {"Range": f"bytes={self.at}-{end}"}
        if self._pieces.validator:
            headers["If-Range"] = self._pieces.validator
        body = connection.ask(self.target, headers)
        try:
            self._check(body)
        except BaseException:
            body.close()
            raise
        self.moved_at = time.monotonic()
        self.is_answered = True
        self.first_byte_s = self.moved_at - asked_at
        return body

    def _check(self, body: Body) -> None:
        """Whether the answer is the range that was asked for, of the file whose bytes are kept."""
        pieces = self._pieces
        is_same = body.validator is None or pieces.validator in {None, body.validator}
        first, total = body.content_range
        # Some caches send the range that was asked for with the status of a whole answer.
        is_range = body.status == 200 and first == self.at and self.target.is_hash_known
        if body.status == 200 and not is_range:
            if not is_same or body.length not in {None, pieces.total}:
                raise FileChanged(body.name)
            raise RangesIgnored(body.name, "the server ignores ranges")
        if body.status == 416:  # of a file that is long enough
            raise RangesIgnored(body.name, "the server refuses ranges of the file")
        if body.status != 206 and not is_range:
            raise body.unwanted()
        if not is_same or total not in {None, pieces.total}:
            raise FileChanged(body.name)
        if first != self.at:
            raise RangesIgnored(body.name, "the server sent another range than was asked for")

    def _read(self, body: Body) -> bytes:
        self.policy.uplink.give_way()
        self.reads += 1
        self.late_reads += body.waiting_bytes >= CHUNK_BYTES
        return body.read(self.end - self.at)

    def _receive(self, body: Body) -> None:
        limit = self.policy.limit
        try:
            while chunk := self._read(body):
                if limit is not None:
                    limit.take(len(chunk), self.left)
                rest = memoryview(chunk)
                self.busy_s = time.thread_time()
                while rest:
                    with self.lock:
                        if self.left.is_set():
                            return
                        part = rest[: max(0, self.end - self.at)]
                        self._staged.write_at(part, self.at)
                        self.at += len(part)
                        self.received += len(part)
                        self.moved_at = time.monotonic()
                        self.is_delivering = True
                        is_done = self.at >= self.end
                    rest = rest[len(part) :]
                    if is_done and not (self.is_open and self._pieces.extend(self)):
                        if not self.is_open:
                            body.finish()
                        return
        finally:
            body.close()


def total_work(work: Work, *readers: RangeReader) -> Work:
    """``work``, and what ``readers`` took besides."""
    for reader in readers:
        work = Work(
            work.busy_s + reader.busy_s, work.reads + reader.reads, work.late_reads + reader.late_reads
        )
    return work
