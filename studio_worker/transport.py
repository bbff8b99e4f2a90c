"""One GET: its address checked at every hop, its body as chunks, given up at once when a cancel comes.

Refuses what the rules for addresses refuse, before anything is asked of it, and bodies in another coding
than the file's own bytes. Knows nothing of files and hashes. No error text holds a query string, a
fragment or user info, and no error carries the library's own, whose texts do.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import requests
import urllib3

from studio_worker.errors import DownloadCancelled, DownloadError, DownloadRefused
from studio_worker.logs import safe_url
from studio_worker.models import url_problem

CHUNK_BYTES = 256 * 1024
"""Measured: larger buffers do not make one connection faster."""

_QUEUED_CHUNKS = 8
_LOOK_AGAIN_S = 0.1
_MAX_REDIRECTS = 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class UnwantedStatus(DownloadError):
    """The server answered with something else than the file.

    Args:
        retry_after_s: seconds the server asked to wait, where it did.
    """

    def __init__(self, name: str, status: int, retry_after_s: float | None) -> None:
        super().__init__("non-success status", f"GET {name} -> {status}", status=status)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Policy:
    """How patient a download is. Times are seconds.

    ``delays_s`` are the waits between tries; a try that brought new bytes starts them again, so that a
    mirror which drops every connection is outlasted as long as it gives something each time. ``wait``
    waits for that long and says whether the event was set meanwhile; tests put their own there.
    """

    connect_s: float = 15.0
    stall_s: float = 30.0
    delays_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    retry_after_cap_s: float = 120.0
    allow_insecure: bool = False
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait


class Answer:
    """The answer to one GET; a context manager.

    A thread of its own reads the network: hashing and writing go on beside it, and whoever takes the
    chunks can leave at any moment, however silent the server is. Such a thread ends with its next
    bytes, or at its time limit.

    Raises:
        DownloadError: ``request error`` here; ``streaming body`` from :meth:`chunks`.
        DownloadCancelled: ``cancel`` was set.
    """

    def __init__(self, url: str, headers: Mapping[str, str], policy: Policy, cancel: threading.Event) -> None:
        self.name = safe_url(url)
        self._cancel = cancel
        self._items: queue.Queue[requests.Response | bytes | DownloadError | None] = queue.Queue(
            _QUEUED_CHUNKS
        )
        self._left = threading.Event()
        threading.Thread(target=self._read, args=(url, headers, policy), name="download", daemon=True).start()
        try:
            head = self._take()
        except BaseException:
            self._left.set()
            raise
        assert isinstance(head, requests.Response)
        self.status: int = head.status_code
        self.headers: Mapping[str, str] = head.headers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()

    @property
    def length(self) -> int | None:
        """``Content-Length``, where it is given and counts."""
        return None if self.is_chunked else _number(self.headers.get("Content-Length", ""))

    @property
    def is_chunked(self) -> bool:
        """Whether the body says itself where it ends."""
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    @property
    def content_range(self) -> tuple[int | None, int | None]:
        """``Content-Range`` as (first byte, length of the whole file); ``None`` for what is not given."""
        unit, _, rest = self.headers.get("Content-Range", "").partition(" ")
        span, _, whole = rest.partition("/")
        first = span.partition("-")[0]
        if unit != "bytes":
            return None, None
        return _number(first), _number(whole)

    def unwanted(self) -> UnwantedStatus:
        """The error for a status that the caller cannot use."""
        return UnwantedStatus(self.name, self.status, _retry_after_s(self.headers.get("Retry-After", "")))

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives."""
        while (chunk := self._take()) is not None:
            assert isinstance(chunk, bytes)
            yield chunk

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

    def _read(self, url: str, headers: Mapping[str, str], policy: Policy) -> None:
        try:
            with contextlib.closing(_ask(url, headers, policy)) as response:
                going = self._put(response)
                while going and (chunk := _next_chunk(response, self.name)):
                    going = self._put(chunk)
            self._put(None)
        except DownloadError as error:
            self._put(error)
        except Exception as error:  # whatever it is, the taker must not wait for ever
            self._put(DownloadError("request error", f"GET {self.name}: {_cause(error)}"))

    def _put(self, item: requests.Response | bytes | DownloadError | None) -> bool:
        while not self._left.is_set():
            try:
                self._items.put(item, timeout=_LOOK_AGAIN_S)
            except queue.Full:
                continue
            return True
        return False


class _Session(requests.Session):
    """Follows no redirect, and does not read a redirect's body, which may be endless, into memory."""

    def get_redirect_target(self, resp: requests.Response) -> None:  # noqa: ARG002  (requests' signature)
        return None


def _ask(url: str, headers: Mapping[str, str], policy: Policy) -> requests.Response:
    """Send the request, and on to where it is redirected; no address is asked before it is checked."""
    name = safe_url(url)
    via = ""
    for _ in range(_MAX_REDIRECTS + 1):
        url = _checked(url, name, via, policy)
        try:
            with _Session() as session:
                response = session.get(
                    url,
                    headers={"Accept-Encoding": "identity", **headers},
                    stream=True,
                    timeout=(policy.connect_s, policy.stall_s),
                    allow_redirects=False,
                )
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise DownloadError("request error", f"GET {name}: {via}{_cause(error)}") from None
        location = response.headers.get("Location")
        if response.status_code not in _REDIRECTS or location is None:
            if (coding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
                response.close()
                raise DownloadRefused(
                    "request error", f"GET {name}: {via}the server insists on coding {coding[:40]}"
                )
            return response
        response.close()
        try:
            url = urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
        except ValueError:
            url = ""
        via = f"redirected to {safe_url(url)}, "
    raise DownloadRefused("request error", f"GET {name}: more than {_MAX_REDIRECTS} redirects")


def _checked(url: str, name: str, via: str, policy: Policy) -> str:
    """``url`` as it will be used. That spelling is checked too: parsers disagree on some host names."""
    try:
        used = requests.Request("GET", url).prepare().url or ""
    except (requests.RequestException, ValueError):
        raise DownloadRefused("request error", f"GET {name}: {via}is not a valid URL") from None
    for spelling in (url, used):
        if problem := url_problem(spelling, allow_insecure=policy.allow_insecure):
            raise DownloadRefused("request error", f"GET {name}: {via}{problem}")
    return used


def _next_chunk(response: requests.Response, name: str) -> bytes:
    try:
        # read1: what has arrived, so that a connection that breaks loses nothing of it.
        return bytes(response.raw.read1(CHUNK_BYTES))
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        raise DownloadError("streaming body", f"GET {name}: streaming body: {_cause(error)}") from None


def _cause(error: BaseException) -> str:
    """The innermost reason of a requests error, which wraps urllib3's, which wraps the system's.

    Their texts quote whole URLs, query strings and all; the innermost one's ``strerror`` does not.
    """
    while (inner := getattr(error, "reason", None) or error.__cause__ or error.__context__) is not None:
        if not isinstance(inner, BaseException):
            break
        error = inner
    text = getattr(error, "strerror", None)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _retry_after_s(text: str) -> float | None:
    """``Retry-After`` in either of its forms, seconds or a date."""
    if (seconds := _number(text)) is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
