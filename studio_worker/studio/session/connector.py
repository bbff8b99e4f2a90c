"""A connection kept open: made, carried and made anew for as long as that makes sense.

In an asyncio loop on the thread of whoever calls :meth:`Connector.run`, so that heartbeats go out on time
whatever torch does. What is said over a connection is the session's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import WebSocketException

from studio_worker.errors import DuplicateWorker, ProtocolError, ReconnectExhausted, RefusedByStudio
from studio_worker.report.logs import ShippingBuffer
from studio_worker.studio.backoff import Backoff
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import Credentials
from studio_worker.studio.session.connection import Connection, Timings, explain, now_s, opened
from studio_worker.studio.session.exchange import Exchange
from studio_worker.studio.session.ports import Box
from studio_worker.studio.session.protocol import SessionProtocol
from studio_worker.studio.session.session import StudioSession
from studio_worker.studio.session.shipping import Shipping

log = logging.getLogger(__name__)


class Connector:
    """Keeps the session connected to its studio until it is stopped, or over for good."""

    def __init__(
        self,
        api: StudioApi,
        box: Box,
        session: StudioSession,
        shipping: ShippingBuffer,
        timings: Timings | None = None,
    ) -> None:
        self._api = api
        self._box = box
        self._session = session
        self._shipping = shipping
        self._timings = timings or Timings()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._stop_requested = threading.Event()
        self._turned_at: float | None = None

    # --- called from other threads ---

    def is_silent(self, seconds: float) -> bool:
        """Whether the loop runs and has not turned for ``seconds``: it hangs."""
        turned_at = self._turned_at
        return turned_at is not None and time.monotonic() - turned_at > seconds

    def stop(self) -> None:
        """Send what is queued, close the connection and end :meth:`run`."""
        self._stop_requested.set()
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # closed
                self._loop.call_soon_threadsafe(self._stopping.set)

    # --- the loop ---

    def run(self, credentials: Credentials) -> None:
        """Stay connected until stopped.

        Raises:
            RefusedByStudio, DuplicateWorker: the studio said that reconnecting is of no use.
            ReconnectExhausted: the allowed number of attempts failed.
        """
        asyncio.run(self._run(credentials))

    async def _run(self, credentials: Credentials) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        with self._session.served():
            if self._stop_requested.is_set():
                return
            pulse = asyncio.create_task(self._pulse())
            try:
                await self._stay_connected(credentials, self._stopping)
            finally:
                pulse.cancel()
                self._turned_at = None

    async def _pulse(self) -> None:
        while True:
            self._turned_at = time.monotonic()
            await asyncio.sleep(1.0)

    async def _stay_connected(self, credentials: Credentials, stopping: asyncio.Event) -> None:
        backoff = Backoff(
            random.Random(), base_s=self._timings.backoff_base_s, cap_s=self._timings.backoff_cap_s
        )
        failed_in_a_row = 0
        while not stopping.is_set():
            was_open, error = await self._connect_once(credentials, stopping)
            if stopping.is_set():
                break
            if isinstance(error, RefusedByStudio | DuplicateWorker):
                raise error
            if was_open:
                backoff.reset()
                failed_in_a_row = 0
            else:
                failed_in_a_row += 1
                if 0 < self._box.reconnect_attempts() <= failed_in_a_row:  # a reload may have lowered it
                    raise ReconnectExhausted(
                        f"{failed_in_a_row} connections in a row failed, the last one: {error}"
                    ) from error
            wait_s = backoff.next_s()
            self._session.went_down(str(error))
            log.warning(
                "session is down",
                extra={"op": "session", "error": str(error), "retry_in_s": round(wait_s, 1)},
            )
            await _wait(stopping, wait_s)

    async def _connect_once(
        self, credentials: Credentials, stopping: asyncio.Event
    ) -> tuple[bool, ProtocolError]:
        """One connection from first to last: whether the studio said welcome, and what ended it."""
        exchange: Exchange | None = None
        error = ProtocolError("the studio closed the connection")
        try:
            socket_ = await self._open(credentials, stopping)
            if socket_ is not None:
                async with socket_:
                    protocol = SessionProtocol(now_s(), self._timings.dead_peer_s)
                    exchange = Exchange(protocol, Shipping(self._shipping))
                    connection = Connection(socket_, exchange, self._session, self._timings)
                    await connection.carry(credentials.auth_token, stopping)
        except (ProtocolError, OSError, WebSocketException) as caught:
            error = explain(caught)
        return exchange is not None and exchange.is_open, error

    async def _open(self, credentials: Credentials, stopping: asyncio.Event) -> ClientConnection | None:
        """The connection, or ``None`` where the stop came first: a studio that is gone must not delay it."""
        url = self._api.session_url(credentials.worker_id)
        opening = asyncio.create_task(
            opened(url, self._api.route, credentials.auth_token, self._timings.connect_s)
        )
        stopped = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait([opening, stopped], return_when=asyncio.FIRST_COMPLETED)
            return opening.result() if opening.done() else None
        finally:
            stopped.cancel()
            opening.cancel()
            await asyncio.gather(opening, stopped, return_exceptions=True)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
