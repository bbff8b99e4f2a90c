"""The socket around the session's rules.

The session runs in an asyncio loop on a thread of its own, so that heartbeats go out on time whatever
torch does. It reconnects for as long as reconnecting makes sense; a dropped connection does not touch
the job in hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Literal

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import WebSocketException

from studio_worker.errors import DuplicateWorker, ProtocolError, ReconnectExhausted, RefusedByStudio
from studio_worker.jobs import Job
from studio_worker.report.logs import ShippingBuffer
from studio_worker.studio.backoff import Backoff
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import Credentials
from studio_worker.studio.session.aside import Aside
from studio_worker.studio.session.connection import Timings, carry, now_s, opened
from studio_worker.studio.session.endings import explain
from studio_worker.studio.session.exchange import Exchange
from studio_worker.studio.session.offers import Judgement, Situation
from studio_worker.studio.session.protocol import SessionProtocol
from studio_worker.studio.session.shipping import Shipping
from studio_worker.studio.wire import Body, Capabilities
from studio_worker.work.desk import Desk

log = logging.getLogger(__name__)


class StudioSession:
    """The session with one studio, reconnected until it is over for good.

    Args:
        api: gives the session's address.
        situation: what the worker knows of itself, asked anew for each offer.
        capabilities: asked anew for each heartbeat.
        uploading: the job whose upload is under way, if any.
        on_redelivery: called with the job that the studio offers while its result waits in the outbox.
        on_answer: called with the judgement of every offer and the model it names, once it is answered.
        on_unreported: called with job id, error and whether it may pass, for a failure that the studio was
            not told because no connection holds its job any more.
        on_state: called with ``connected``, or with ``reconnecting`` and why.
        reconnect_attempts: failed connections in a row before giving up; 0 = never. Asked each time.
    """

    def __init__(
        self,
        *,
        api: StudioApi,
        desk: Desk,
        situation: Callable[[], Situation],
        capabilities: Callable[[], Capabilities],
        uploading: Callable[[], str | None],
        on_redelivery: Callable[[str], None],
        on_answer: Callable[[Judgement, str], None],
        on_unreported: Callable[[str, str, bool], None],
        shipping: ShippingBuffer,
        reconnect_attempts: Callable[[], int] = lambda: 0,
        on_state: Callable[[Literal["connected", "reconnecting"], str], None],
        timings: Timings | None = None,
    ) -> None:
        self._api = api
        self._desk = desk
        self._situation = situation
        self._capabilities = capabilities
        self._uploading = uploading
        self._on_redelivery = on_redelivery
        self._on_answer = on_answer
        self._on_unreported = on_unreported
        self._shipping = shipping
        self._reconnect_attempts = reconnect_attempts
        self._timings = timings or Timings()
        self._on_state = on_state
        self._aside = Aside(self._call)
        self._exchange: Exchange | None = None
        self._was_open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._stop_requested = threading.Event()
        self._turned_at: float | None = None

    # --- called from other threads ---

    def take(self, rest: Callable[[], None]) -> Job | None:
        """The next accepted job; waits for one. ``None`` = there will be no more."""
        return self._desk.take(rest)

    def failed(self, job: Job, error: str, *, retryable: bool) -> None:
        """Report a failed job, if the studio still holds it for this connection."""
        self.report_failure(job.job_id, error, retryable=retryable)

    def report_failure(self, job_id: str, error: str, *, retryable: bool) -> None:
        """The same for a job known by its id only."""
        if not self._call(self._fail, job_id, error, retryable):
            self._on_unreported(job_id, error, retryable)

    def finished(self, job: Job) -> None:  # noqa: ARG002  (there is room for one job only)
        """The job in hand has ended."""
        self._desk.clear()

    def delivered(self, job_id: str) -> None:
        """The job's result has been uploaded."""
        self._call(self._delivered, job_id)

    def beat(self) -> None:
        """Send a heartbeat at once, if there is an open session: what the studio should know has changed."""
        self._call(self._beat)

    def lost(self, job_id: str, error: str) -> None:
        """A finished picture is gone that the studio may wait for: report it, or answer its offer anew."""
        if not self._call(self._lose, job_id, error):
            self._on_unreported(job_id, error, True)

    def settled(self, job_id: str) -> None:
        """An upload has ended, during which its job was offered again."""
        self._call(self._settle, job_id)

    def is_silent(self, seconds: float) -> bool:
        """Whether the loop runs and has not turned for ``seconds``: it hangs."""
        turned_at = self._turned_at
        return turned_at is not None and time.monotonic() - turned_at > seconds

    def stop(self) -> None:
        """Send what is queued, close the connection and end :meth:`run`."""
        self._stop_requested.set()
        if self._stopping is not None:
            self._call(self._stopping.set)

    def _call(self, what: Callable[..., None], *args: object) -> bool:
        """Do it in the loop's thread; ``False`` where there is no loop, or no more."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(what, *args)
        except RuntimeError:  # closed
            return False
        return self._loop is not None

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
        if self._stop_requested.is_set():
            return
        pulse = asyncio.create_task(self._pulse())
        try:
            await self._stay_connected(credentials, self._stopping)
        finally:
            pulse.cancel()
            self._aside.close()
            self._turned_at = None

    async def _stay_connected(self, credentials: Credentials, stopping: asyncio.Event) -> None:
        backoff = Backoff(
            random.Random(), base_s=self._timings.backoff_base_s, cap_s=self._timings.backoff_cap_s
        )
        failed_in_a_row = 0
        while not stopping.is_set():
            self._was_open = False
            try:
                await self._connect_once(credentials, stopping)
                error = ProtocolError("the studio closed the connection")
            except (ProtocolError, OSError, WebSocketException) as caught:
                error = explain(caught)
            if stopping.is_set():
                break
            if isinstance(error, RefusedByStudio | DuplicateWorker):
                raise error
            if self._was_open:
                backoff.reset()
                failed_in_a_row = 0
            else:
                failed_in_a_row += 1
                if failed_in_a_row == self._reconnect_attempts():
                    raise ReconnectExhausted(
                        f"{failed_in_a_row} connections in a row failed, the last one: {error}"
                    ) from error
            wait_s = backoff.next_s()
            self._on_state("reconnecting", str(error))
            log.warning(
                "session is down",
                extra={"op": "session", "error": str(error), "retry_in_s": round(wait_s, 1)},
            )
            await _wait(stopping, wait_s)

    async def _pulse(self) -> None:
        while True:
            self._turned_at = time.monotonic()
            await asyncio.sleep(1.0)

    async def _connect_once(self, credentials: Credentials, stopping: asyncio.Event) -> None:
        socket_ = await self._open(credentials, stopping)
        if socket_ is None:
            return
        async with socket_:
            outgoing: asyncio.Queue[Body | None] = asyncio.Queue()
            exchange = self.begin(outgoing.put_nowait, credentials)
            try:
                await carry(
                    socket_,
                    exchange,
                    outgoing,
                    timings=self._timings,
                    stopping=stopping,
                    on_welcome=self._welcomed,
                )
            finally:
                self.end()

    def begin(self, send: Callable[[Body], None], credentials: Credentials) -> Exchange:
        """A connection is made: say hello over it. In the loop's thread, like everything below."""
        self._exchange = Exchange(
            SessionProtocol(now_s(), self._timings.dead_peer_s),
            send,
            desk=self._desk,
            situation=self._situation,
            capabilities=self._capabilities,
            uploading=self._uploading,
            shipping=Shipping(self._shipping),
            on_redelivery=self._on_redelivery,
            on_answer=self._on_answer,
            aside=self._aside.do,
        )
        self._exchange.begin(credentials.auth_token)
        return self._exchange

    def end(self) -> None:
        """The connection is gone: nothing more can be said over it."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.end()

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

    def _welcomed(self) -> None:
        self._was_open = True
        self._on_state("connected", "")

    def _fail(self, job_id: str, error: str, retryable: bool) -> None:
        if self._exchange is not None and self._exchange.fail(job_id, error, retryable=retryable):
            return
        log.info(
            "failure not reported: the studio has put the job back",
            extra={"op": "job", "job_id": job_id},
        )
        self._on_unreported(job_id, error, retryable)

    def _lose(self, job_id: str, error: str) -> None:
        if job_id == self._desk.current_job_id:
            return  # it is being made anew already
        if self._exchange is None or not self._exchange.settle(job_id):
            self._fail(job_id, error, True)

    def _settle(self, job_id: str) -> None:
        if self._exchange is not None:
            self._exchange.settle(job_id)

    def _beat(self) -> None:
        if self._exchange is not None:
            self._exchange.beat()

    def _delivered(self, job_id: str) -> None:
        if self._exchange is not None:
            self._exchange.protocol.delivered(job_id)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
