"""One answer: its body as it arrives, given up at once when a cancel comes.

What its head says is head.py's, how it is asked for asking.py's work. Knows nothing of files and hashes.
No error text holds a query string, a fragment or user info, and no error carries the library's own, whose
texts do.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import http.client
import queue
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

import requests
import urllib3

from studio_worker.context import carried
from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.transfer.asking import Session, Target, ask, cause
from studio_worker.transfer.head import Head
from studio_worker.transfer.policy import Policy

CHUNK_BYTES = 256 * 1024
"""So much is taken at most of what has arrived, until it is known how fast more comes."""
_GATHER_S = 0.02
"""So long is waited for more than has arrived: waking one of many threads costs more than what it brings."""
_GATHER_BYTES = 512 * 1024
"""Never more than this is asked for at once, because a connection that is reset loses it,"""
_LOST_SHARE = 1 / 64
"""or than this share of what the answer has brought,"""
_LARGEST_READ = 1536 * 1024
"""and this at most. Measured: a sixth faster where nothing limits a connection; TLS would gain by more."""
_RECORD_BYTES = 16 * 1024
_JUDGED_AFTER_S = 0.05
_QUEUED_CHUNKS = 8
_LOOK_AGAIN_S = 0.1
_NO_THREAD = "this process may start no more threads: raise their limit (TasksMax, ulimit -u)"


class Body(Head):
    """An answer that is read in the caller's own thread."""

    def __init__(self, name: str, response: requests.Response) -> None:
        super().__init__(name, response)
        self._response = response
        self._wanted = 0
        self._rate = 0.0
        self._since = time.monotonic()
        self._count = self._brought = 0

    def read(self, most: int) -> bytes:
        """What has arrived, ``most`` bytes of it; ``b""`` at the end.

        Raises:
            DownloadError: the connection breaks.
        """
        wanted = min(self._wanted, most)
        if 0 < self._wanted < _GATHER_BYTES and (missing := wanted - self.waiting_bytes) > 0:
            # A wait on the socket would end with the next packet. Never where it is fast: that would slow it.
            time.sleep(missing / self._rate)
        chunk = _next_chunk(self._response, self.name, most=wanted or most, is_whole=wanted > 0)
        self._count += len(chunk)
        now = time.monotonic()
        if now - self._since > _JUDGED_AFTER_S:
            self._judge(now)
        return chunk

    def _judge(self, now: float) -> None:
        """How much is read at once from now on."""
        self._rate = self._count / (now - self._since)
        self._brought += self._count
        self._since, self._count = now, 0
        expected = int(_GATHER_S * self._rate)
        most = max(_GATHER_BYTES, min(int(_LOST_SHARE * self._brought), _LARGEST_READ))
        self._wanted = min(expected, most) if expected > _RECORD_BYTES else 0

    @property
    def waiting_bytes(self) -> int:
        """How much has arrived that was not read, as it came over the line."""
        if self._response.raw.closed:  # read to its end
            return 0
        count = array.array("i", [0])
        fcntl.ioctl(self._response.raw.fileno(), termios.FIONREAD, count)
        return count[0]

    def finish(self) -> None:
        """All that is wanted has come: read the end too, so that the connection can be used again."""
        if self.length is not None:
            with contextlib.suppress(DownloadError):
                _next_chunk(self._response, self.name)

    def close(self) -> None:
        """Done with it; a body that was read to its end leaves its connection for the next request."""
        self._response.close()


class Connection:
    """Asks again and again, over one connection where the server keeps it; for one thread."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._session = Session(policy)

    def ask(self, target: Target, headers: Mapping[str, str]) -> Body:
        """The answer to one GET. Raises DownloadError."""
        return Body(target.name, ask(target, headers, self._policy, self._session))

    def close(self) -> None:
        """Close it."""
        self._session.close()


class Answer(Head):
    """The answer to one GET; a context manager.

    A thread of its own reads the network: hashing and writing go on beside it, and whoever takes the
    chunks can leave at any moment, however silent the server is. Such a thread ends with its next
    bytes, or at its time limit.

    Raises:
        DownloadError: ``request error`` here; ``streaming body`` from :meth:`chunks`.
        DownloadCancelled: ``cancel`` was set.
    """

    def __init__(
        self, target: Target, headers: Mapping[str, str], policy: Policy, cancel: threading.Event
    ) -> None:
        self.name = target.name
        self._cancel = cancel
        self._items: queue.Queue[requests.Response | bytes | DownloadError | None] = queue.Queue(
            _QUEUED_CHUNKS
        )
        self._left, self._decided = threading.Event(), threading.Event()
        self._is_detached = False
        self._limit = policy.limit
        reading = threading.Thread(target=carried(self._read), args=(target, headers, policy))
        reading.name, reading.daemon = "download", True
        try:
            reading.start()
        except RuntimeError as error:
            raise DownloadError("request error", f"GET {self.name}: {_NO_THREAD}") from error
        try:
            head = self._take()
        except BaseException:
            self._leave()
            raise
        assert isinstance(head, requests.Response)
        self._response = head
        super().__init__(self.name, head)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def detach(self) -> Body:
        """The same answer with its body still unread, for a thread of the caller's, who closes it."""
        self._is_detached = True
        self._decided.set()
        return Body(self.name, self._response)

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives."""
        self._decided.set()
        while (chunk := self._take()) is not None:
            assert isinstance(chunk, bytes)
            yield chunk

    def _leave(self) -> None:
        self._left.set()
        self._decided.set()

    def _take(self) -> requests.Response | bytes | None:
        while not self._cancel.is_set():
            try:
                item = self._items.get(timeout=_LOOK_AGAIN_S)
            except queue.Empty:
                continue
            if isinstance(item, DownloadError):
                raise item
            return item
        raise DownloadCancelled(self.name)

    # --- the reading thread ---

    def _read(self, target: Target, headers: Mapping[str, str], policy: Policy) -> None:
        try:
            response = ask(target, headers, policy)
            self._put(response)
            self._decided.wait()
            if self._is_detached:
                return
            with contextlib.closing(response):
                while not self._left.is_set():
                    policy.uplink.give_way()
                    if not (chunk := _next_chunk(response, self.name)):
                        break
                    if self._limit is not None:
                        self._limit.take(len(chunk), self._left)
                    self._put(chunk)
            self._put(None)
        except DownloadError as error:
            self._put(error)
        except Exception as error:  # whatever it is, the taker must not wait for ever
            self._put(DownloadError("request error", f"GET {self.name}: {cause(error)}"))

    def _put(self, item: requests.Response | bytes | DownloadError | None) -> None:
        while not self._left.is_set():
            with contextlib.suppress(queue.Full):
                self._items.put(item, timeout=_LOOK_AGAIN_S)
                return


def _next_chunk(
    response: requests.Response, name: str, *, most: int = CHUNK_BYTES, is_whole: bool = False
) -> bytes:
    """What has arrived, so that a connection that breaks loses nothing of it; or all of ``most`` bytes."""
    try:
        chunk = response.raw.read(most) if is_whole else response.raw.read1(min(most, CHUNK_BYTES))
        return bytes(chunk)  # the same object: only its type is not known
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        raise DownloadError("streaming body", f"GET {name}: streaming body: {cause(error)}") from None
