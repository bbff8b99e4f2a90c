"""The connection under a request: which address takes it, how long is waited for what, what is read past.

The addresses of a name are tried side by side (RFC 8305), because one of them may swallow everything that is
sent to it: IPv6 on many a network. Judges no address itself: who may be connected to is told by the caller.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import itertools
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import requests
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

ATTEMPT_DELAY_S = 0.25
"""So long has one address before the next is tried beside it (RFC 8305, 5)."""
_MOST_INTERIM = 100
"""Answers before the answer: 103 comes once or twice."""
_MOST_REMEMBERED = 256
_LEAST_S = 0.001
"""0 would mean not to wait at all, which ends in another error."""
_WAITING_BYTES = 128 * 1024
"""So much of what is sent waits here for the network at most, not the MBs that the system would take: what
was taken for sending is then all but sent. It keeps 5 Mbit/s busy for 0.2 s."""

Found = tuple[Any, Any, int, str, tuple[Any, ...]]
"""As of :func:`socket.getaddrinfo`."""


class Reached:
    """Which address of a host took a connection last: it is the first to be tried next time."""

    def __init__(self) -> None:
        self._last: dict[str, object] = {}

    def ordered(self, host: str, found: Iterable[Found]) -> list[Found]:
        """``found`` with the families in turn, and the address that is known to work before all."""
        entries = list(found)
        same = [entry for entry in entries if entry[0] == entries[0][0]]
        other = [entry for entry in entries if entry[0] != entries[0][0]]
        pairs = itertools.zip_longest(same, other)
        turns = [entry for pair in pairs for entry in pair if entry is not None]
        return sorted(turns, key=lambda entry: entry[4][0] != self._last.get(host))

    def note(self, host: str, address: object) -> None:
        """``address`` has taken a connection."""
        if len(self._last) >= _MOST_REMEMBERED:
            self._last.clear()
        self._last[host] = address


def connect_first(found: Iterable[Found], timeout_s: float) -> socket.socket:
    """A connection to the first that takes one; each is tried a little after the one before.

    Raises:
        OSError: nobody does; ``ETIMEDOUT`` where nobody has answered in ``timeout_s``.
    """
    waiting = deque(found)
    last = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    now = next_at = time.monotonic()
    until = now + timeout_s
    tried: list[socket.socket] = []
    with selectors.PollSelector() as selector:
        try:
            while waiting or tried:
                if waiting and (now >= next_at or not tried):
                    next_at = now + ATTEMPT_DELAY_S
                    try:
                        tried.append(_begin(waiting.popleft()))
                        selector.register(tried[-1], selectors.EVENT_WRITE)
                    except OSError as error:  # of a family that this machine does not have, say
                        last, next_at = error, now
                    continue
                for key, _ in selector.select(max(0.0, min(until, next_at if waiting else until) - now)):
                    (ready,) = (each for each in tried if each is key.fileobj)
                    selector.unregister(ready)
                    tried.remove(ready)
                    number = ready.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not number:
                        return ready
                    ready.close()
                    last, next_at = OSError(number, os.strerror(number)), now
                now = time.monotonic()
                if now >= until:
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            raise last
        finally:
            for loser in tried:
                loser.close()


def _begin(entry: Found) -> socket.socket:
    family, kind, protocol, _, address = entry
    begun = socket.socket(family, kind, protocol)
    try:
        begun.setblocking(False)
        if (number := begun.connect_ex(address)) not in {0, errno.EINPROGRESS}:
            raise OSError(number, os.strerror(number))
    except BaseException:
        begun.close()
        raise
    return begun


class Adapter(requests.adapters.HTTPAdapter):
    """What a :class:`requests.Session` connects with; for one thread.

    Args:
        stall_s: limit of each wait for more of a body; the session's ``timeout`` is that of its first byte.
        check: called with a host, the port and each address of it, and raises where it must not be connected
            to. A proxy's own address is not looked at.
    """

    def __init__(
        self, *, stall_s: float, reached: Reached, check: Callable[[str, int, str], None] | None = None
    ) -> None:
        self.stall_s = stall_s
        self.reached = reached
        self.check = check
        self.target = ""
        """What the next request asks a host for, byte for byte; empty = as the libraries spell it."""
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self, self.check)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = _pools(self, None)
        return manager


def _pools(adapter: Adapter, check: Callable[[str, int, str], None] | None) -> dict[str, Any]:
    ways = {
        "adapter": adapter,
        "check": staticmethod(check) if check else None,
        # Raises where the library calls it otherwise: else no address would be checked, unnoticed.
        HTTPConnection._new_conn.__name__: _Connection.connected,
    }
    return {
        scheme: type("Pool", (pool,), {"ConnectionCls": type("Connection", (_Connection, kind), ways)})
        for scheme, pool, kind in (
            ("http", urllib3.HTTPConnectionPool, HTTPConnection),
            ("https", urllib3.HTTPSConnectionPool, HTTPSConnection),
        )
    }


class _Arriving(io.RawIOBase):
    """What arrives at a socket. Until ``until`` is taken away all of it has that long together, where the
    socket's own limit is one for each piece: a head that drips would be waited for without an end.
    """

    def __init__(self, connected: socket.socket) -> None:
        limit_s = connected.gettimeout()
        self.until = None if limit_s is None else time.monotonic() + limit_s
        self._socket = connected
        self._raw = connected.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.until is not None:
            self._socket.settimeout(max(_LEAST_S, self.until - time.monotonic()))
        return self._raw.readinto(buffer)

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """Reads past every interim answer, not 100 alone: 103 tells what a page will need (RFC 9110, 15.2)."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self._arriving = _Arriving(sock)
        self.fp = io.BufferedReader(self._arriving)

    def begin(self) -> None:
        super().begin()
        for _ in range(_MOST_INTERIM):
            if not 100 < self.status < 200 or self.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                self._arriving.until = None
                return
            self.headers = self.msg = None  # type: ignore[assignment]  # begin anew
            super().begin()
        raise http.client.HTTPException("interim answers without an end")


class _Connection:
    """Mixed into a connection of urllib3."""

    adapter: Adapter
    check: Callable[[str, int, str], None] | None
    response_class = _Response

    def connected(self: Any) -> socket.socket:
        """A socket that an address of the host has taken."""
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise NameResolutionError(self.host, self, socket.gaierror(str(error))) from error
        if self.check is not None:
            for address in dict.fromkeys(str(entry[4][0]) for entry in found):
                self.check(self.host, self.port, address)
        reached = self.adapter.reached
        try:
            connected = connect_first(reached.ordered(self.host, found), self.timeout)
        except TimeoutError as error:
            raise ConnectTimeoutError(self, "nobody answers") from error
        except OSError as error:
            raise NewConnectionError(self, "no connection") from error
        reached.note(self.host, connected.getpeername()[0])
        connected.settimeout(self.timeout)
        for option in self.socket_options or ():
            connected.setsockopt(*option)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _WAITING_BYTES)
        return connected

    def putrequest(self: Any, method: str, url: str, *args: Any, **kwargs: Any) -> None:
        # The libraries spell escapes anew (%7e becomes ~, %2f becomes %2F), which breaks a signature. A proxy
        # that forwards is given the whole address, as they have it.
        target = self.adapter.target if url.startswith("/") else ""
        super().putrequest(method, target or url, *args, **kwargs)  # type: ignore[misc]

    def getresponse(self: Any) -> Any:
        connected = self.sock
        response = super().getresponse()  # type: ignore[misc]
        with contextlib.suppress(OSError):  # closed already, with nothing to wait for
            connected.settimeout(self.adapter.stall_s)
        return response
