"""One WebSocket connection: opened, carried, watched, closed. What is said over it is the session's.

Raises what the library raises; :func:`explain`, the one place that maps it, says in our own errors what it
means.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidProxy,
    InvalidProxyStatus,
    InvalidStatus,
    NegotiationError,
    ProxyError,
)
from websockets.typing import Subprotocol

from studio_worker.errors import ProtocolError
from studio_worker.network.connecting import ATTEMPT_DELAY_S
from studio_worker.network.reasons import said
from studio_worker.studio.http.api import hint
from studio_worker.studio.http.route import Route
from studio_worker.studio.http.transport import USER_AGENT, untrusted
from studio_worker.studio.session.exchange import Exchange
from studio_worker.studio.session.protocol import SessionProtocol, error_for_code
from studio_worker.studio.session.session import StudioSession
from studio_worker.studio.wire import (
    DEAD_PEER_S,
    HEARTBEAT_INTERVAL_S,
    LOG_BATCH_INTERVAL_S,
    SUBPROTOCOL,
    Body,
)

CONNECT_TIMEOUT_S = 15.0
MAX_FRAME_BYTES = 16 * 1024 * 1024
"""A larger frame closes the connection with code 1009, message too big (RFC 6455, 7.4.1)."""
_CLOSE_TIMEOUT_S = 5.0
_MAX_UNSENT, _UNSENT_S = 200, 0.1
"""With more frames than this unsent, the studio sends and does not read: neither is its next frame read."""


@dataclass(frozen=True)
class Timings:
    """Seconds; tests shorten them."""

    heartbeat_s: float = HEARTBEAT_INTERVAL_S
    log_batch_s: float = LOG_BATCH_INTERVAL_S
    connect_s: float = CONNECT_TIMEOUT_S
    dead_peer_s: float = DEAD_PEER_S
    backoff_base_s: float = 1.0
    backoff_cap_s: float = 30.0


class _Connect(connect):
    """Follows no redirect: the first frame holds the token, and goes to the configured studio alone."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


async def opened(url: str, route: Route, auth_token: str, timeout_s: float) -> ClientConnection:
    """A connection after its upgrade; TCP, TLS and upgrade share ``timeout_s``."""
    return await _Connect(
        url,
        additional_headers={"Authorization": f"Bearer {auth_token}"},
        user_agent_header=USER_AGENT,
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        open_timeout=timeout_s,
        close_timeout=_CLOSE_TIMEOUT_S,
        ping_interval=None,  # only the protocol's own frames count as signs of life
        max_size=MAX_FRAME_BYTES,
        proxy=route.proxy,
        ssl=route.ssl_context() if url.startswith("wss:") else None,
        happy_eyeballs_delay=ATTEMPT_DELAY_S,
    )


class Connection:
    """Carries the session over one socket: reads, sends, heartbeats, ships and watches side by side."""

    def __init__(
        self, socket_: ClientConnection, exchange: Exchange, session: StudioSession, timings: Timings
    ) -> None:
        self._socket = socket_
        self._exchange = exchange
        self._session = session
        self._timings = timings
        self._outgoing: asyncio.Queue[Body | None] = asyncio.Queue()

    async def carry(self, auth_token: str, stopping: asyncio.Event) -> None:
        """From hello on, until something fails or ``stopping`` is set."""
        self._session.begin(self._exchange, self._outgoing.put_nowait, auth_token)
        try:
            await self._carry(stopping)
        finally:
            self._session.end()

    async def _carry(self, stopping: asyncio.Event) -> None:
        stopped = asyncio.create_task(stopping.wait())
        sending = asyncio.create_task(self._write())
        others = [
            asyncio.create_task(self._read()),
            asyncio.create_task(watch(self._exchange.protocol, self._timings.dead_peer_s)),
            asyncio.create_task(_every(self._timings.heartbeat_s, self._session.beat)),
            asyncio.create_task(_every(self._timings.log_batch_s, self._session.ship)),
        ]
        tasks = [stopped, sending, *others]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what ended it
            self._session.ship()  # the log's last lines too
            self._outgoing.put_nowait(None)  # stopping: what is queued still goes out, if there is a way
            await asyncio.wait([sending, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            while self._outgoing.qsize() > _MAX_UNSENT:
                await asyncio.sleep(_UNSENT_S)
            self._session.receive(await self._socket.recv(), now_s())

    async def _write(self) -> None:
        """Send what is queued, until ``None`` is."""
        while (frame := await self._outgoing.get()) is not None:
            await self._socket.send(frame.to_json())


async def _every(seconds: float, act: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        act()


def now_s() -> float:
    """Seconds on the clock that nobody can set and that goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def watch(protocol: SessionProtocol, dead_peer_s: float, clock: Callable[[], float] = now_s) -> None:
    """Raises ProtocolError once the studio has been silent for too long.

    The clock counts a suspended machine's time too: what slept longer than the limit has been forgotten by
    the studio, and would otherwise be waited for once more. A tick that comes late gives no verdict: after
    a sleep, or where something held this process up, frames may lie unread in the socket.
    """
    tick_s = min(1.0, dead_peer_s / 4)
    last = clock()
    while True:
        await asyncio.sleep(tick_s)
        now = clock()
        if now - last < 2 * tick_s and now > protocol.dead_at:
            raise ProtocolError(f"no frame from the studio for {dead_peer_s:g} s")
        last = now


def explain(error: Exception) -> ProtocolError:
    """A connection's end, or its failure to begin, as one of our own errors; its class says whether for good.

    The texts name no address: a proxy's may hold a password.
    """
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, ConnectionClosed):
        return _closed(error)
    if isinstance(error, InvalidStatus):
        return _refused(error.response.status_code)
    return ProtocolError(_unreachable(error))


def _closed(error: ConnectionClosed) -> ProtocolError:
    if error.rcvd is not None and (error.sent is None or error.rcvd_then_sent):
        return error_for_code(error.rcvd.code, error.rcvd.reason or f"close code {error.rcvd.code}")
    if error.sent is not None:
        # We closed: a frame that is too big (1009), no UTF-8 (1007), or no WebSocket at all (1002).
        detail = error.sent.reason or "no reason"
        return ProtocolError(f"the connection was closed with code {error.sent.code} ({detail})")
    return ProtocolError("the connection broke")


def _refused(status: int) -> ProtocolError:
    if status == 401:
        return error_for_code(4001, "HTTP 401")
    return ProtocolError(f"the studio answered HTTP {status} to the connection{hint(status)}")


def _unreachable(error: Exception) -> str:
    match error:
        case InvalidProxyStatus():
            return f"the proxy answered HTTP {error.response.status_code}; see https_proxy and no_proxy"
        case ProxyError() | InvalidProxy():
            return "the proxy gave no usable answer; see https_proxy and no_proxy"
        case socket.gaierror():
            return f"the studio's name cannot be resolved ({error.strerror}); see the network and its DNS"
        case ssl.SSLCertVerificationError():
            return untrusted(error)
        case ssl.SSLError():
            return f"no encrypted connection to the studio ({error.reason or type(error).__name__})"
        case TimeoutError():
            return "the studio did not answer in time"
        case NegotiationError():
            return "the studio does not speak this protocol"
        case InvalidHandshake():
            return f"the studio's answer is no session: {type(error).__name__}"
        case _:
            return f"the studio cannot be reached: {said(error)}"
