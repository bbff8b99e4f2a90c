"""One WebSocket connection: opened, carried, watched, closed. What is said over it is the exchange's.

Raises what the library raises; ``endings.py`` says what that means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from studio_worker.errors import ProtocolError
from studio_worker.network.connecting import ATTEMPT_DELAY_S
from studio_worker.studio.http.api import USER_AGENT
from studio_worker.studio.http.route import Route
from studio_worker.studio.session.exchange import Exchange
from studio_worker.studio.session.protocol import SessionProtocol
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


async def carry(
    socket_: ClientConnection,
    exchange: Exchange,
    outgoing: asyncio.Queue[Body | None],
    *,
    timings: Timings,
    stopping: asyncio.Event,
    on_welcome: Callable[[], None],
) -> None:
    """Read, send, heartbeat, ship and watch side by side, until one of them fails or ``stopping`` is set."""
    stopped = asyncio.create_task(stopping.wait())
    sending = asyncio.create_task(_send(socket_, outgoing))
    others = [
        asyncio.create_task(_read(socket_, exchange, outgoing, on_welcome)),
        asyncio.create_task(watch(exchange.protocol, timings.dead_peer_s)),
        asyncio.create_task(_every(timings.heartbeat_s, exchange.beat)),
        asyncio.create_task(_every(timings.log_batch_s, exchange.ship)),
    ]
    tasks = [stopped, sending, *others]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises what ended it
        exchange.ship()  # the log's last lines too
        outgoing.put_nowait(None)  # stopping: what is queued still goes out, if there is a way
        await asyncio.wait([sending, *others], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(
    socket_: ClientConnection,
    exchange: Exchange,
    outgoing: asyncio.Queue[Body | None],
    on_welcome: Callable[[], None],
) -> None:
    while True:
        while outgoing.qsize() > _MAX_UNSENT:
            await asyncio.sleep(_UNSENT_S)
        if exchange.receive(await socket_.recv(), now_s()):
            on_welcome()


async def _send(socket_: ClientConnection, outgoing: asyncio.Queue[Body | None]) -> None:
    """Send what is queued, until ``None`` is."""
    while (frame := await outgoing.get()) is not None:
        await socket_.send(frame.to_json())


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
