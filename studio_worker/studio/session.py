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
from dataclasses import dataclass

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from studio_worker.errors import (
    DuplicateWorker,
    FrameError,
    ProtocolError,
    ReconnectExhausted,
    RefusedByStudio,
)
from studio_worker.jobs import Job
from studio_worker.logs import ShippingBuffer
from studio_worker.studio.api import StudioApi
from studio_worker.studio.desk import Desk
from studio_worker.studio.endings import explain
from studio_worker.studio.offers import AlreadyOurs, Ignore, Impossible, Refuse, Situation, Take, judge
from studio_worker.studio.protocol import (
    Backoff,
    Offered,
    SessionProtocol,
    State,
    Welcomed,
)
from studio_worker.studio.registration import Credentials
from studio_worker.studio.shipping import next_batch
from studio_worker.studio.wire import (
    DEAD_PEER_S,
    HEARTBEAT_INTERVAL_S,
    LOG_BATCH_INTERVAL_S,
    SUBPROTOCOL,
    Body,
    Capabilities,
)

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 15.0
_MAX_FRAME_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Timings:
    """Seconds; tests shorten them."""

    heartbeat_s: float = HEARTBEAT_INTERVAL_S
    log_batch_s: float = LOG_BATCH_INTERVAL_S
    connect_s: float = CONNECT_TIMEOUT_S
    dead_peer_s: float = DEAD_PEER_S
    backoff_base_s: float = 1.0


class StudioSession:
    """The session with one studio, reconnected until it is over for good.

    Args:
        api: gives the session's address.
        situation: what the worker knows of itself, asked anew for each offer.
        capabilities: asked anew for each heartbeat.
        uploading: the job whose upload is under way, if any.
        on_redelivery: called when the studio offers a job whose result waits in the outbox.
        on_state: called with ``connected`` or ``reconnecting``.
        reconnect_attempts: failed connections in a row before giving up; 0 = never.
    """

    def __init__(
        self,
        *,
        api: StudioApi,
        desk: Desk,
        situation: Callable[[], Situation],
        capabilities: Callable[[], Capabilities],
        uploading: Callable[[], str | None],
        on_redelivery: Callable[[], None],
        shipping: ShippingBuffer,
        reconnect_attempts: int = 0,
        on_state: Callable[[str], None],
        timings: Timings | None = None,
    ) -> None:
        self._api = api
        self._desk = desk
        self._situation = situation
        self._capabilities = capabilities
        self._uploading = uploading
        self._on_redelivery = on_redelivery
        self._shipping = shipping
        self._attempts = reconnect_attempts
        self._timings = timings or Timings()
        self._on_state = on_state
        self._protocol: SessionProtocol | None = None
        self._outgoing: asyncio.Queue[Body] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._stop_requested = threading.Event()
        self._turned_at: float | None = None

    # --- called from other threads ---

    def take(self) -> Job | None:
        """The next accepted job; waits for one. ``None`` = there will be no more."""
        return self._desk.take()

    def failed(self, job: Job, error: str, *, retryable: bool) -> None:
        """Report a failed job, if the studio still holds it for this connection."""
        self.report_failure(job.job_id, error, retryable=retryable)

    def report_failure(self, job_id: str, error: str, *, retryable: bool) -> None:
        """The same for a job known by its id only."""
        self._call(self._fail, job_id, error, retryable)

    def finished(self, job: Job) -> None:  # noqa: ARG002  (there is room for one job only)
        """The job in hand has ended."""
        self._desk.clear()

    def delivered(self, job_id: str) -> None:
        """The job's result has been uploaded."""
        self._call(self._delivered, job_id)

    def is_silent(self, seconds: float) -> bool:
        """Whether the loop runs and has not turned for ``seconds``: it hangs."""
        turned_at = self._turned_at
        return turned_at is not None and time.monotonic() - turned_at > seconds

    def stop(self) -> None:
        """Send what is queued, close the connection and end :meth:`run`."""
        self._stop_requested.set()
        if self._stopping is not None:
            self._call(self._stopping.set)

    def _call(self, what: Callable[..., None], *args: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what, *args)

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
        backoff = Backoff(random.Random(), base_s=self._timings.backoff_base_s)
        pulse = asyncio.create_task(self._pulse())
        try:
            while not self._stopping.is_set():
                try:
                    await self._connect_once(credentials, backoff)
                    error: Exception = ProtocolError("the studio closed the connection")
                except (ProtocolError, OSError, WebSocketException, TimeoutError) as caught:
                    error = caught
                if self._stopping.is_set():
                    break
                error = explain(error)
                if isinstance(error, RefusedByStudio | DuplicateWorker):
                    raise error
                wait_s = backoff.next_s()
                if self._attempts and backoff.failures >= self._attempts:
                    raise ReconnectExhausted(
                        f"{backoff.failures} connections in a row failed, the last one: {error}"
                    ) from error
                self._on_state("reconnecting")
                log.warning(
                    "session is down",
                    extra={"op": "session", "error": str(error), "retry_in_s": round(wait_s, 1)},
                )
                await _wait(self._stopping, wait_s)
        finally:
            pulse.cancel()
            self._turned_at = None

    async def _pulse(self) -> None:
        while True:
            self._turned_at = time.monotonic()
            await asyncio.sleep(1.0)

    async def _connect_once(self, credentials: Credentials, backoff: Backoff) -> None:
        async with connect(
            self._api.session_url(credentials.worker_id),
            additional_headers={"Authorization": f"Bearer {credentials.auth_token}"},
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            open_timeout=self._timings.connect_s,
            close_timeout=5.0,
            ping_interval=None,  # only the protocol's own frames count as signs of life
            max_size=_MAX_FRAME_BYTES,
        ) as socket_:
            self._protocol = protocol = SessionProtocol(time.monotonic(), self._timings.dead_peer_s)
            self._outgoing = asyncio.Queue()
            try:
                hello = protocol.hello(credentials.auth_token, self._capabilities())
                await socket_.send(hello.to_json())
                await self._serve(socket_, protocol, backoff)
            finally:
                self._protocol = None

    async def _serve(self, socket_: ClientConnection, protocol: SessionProtocol, backoff: Backoff) -> None:
        assert self._stopping is not None
        tasks = [
            asyncio.create_task(self._read(socket_, protocol, backoff)),
            asyncio.create_task(self._send(socket_)),
            asyncio.create_task(self._beat(protocol)),
            asyncio.create_task(self._ship(protocol)),
            asyncio.create_task(self._stopping.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what ended it
            while not self._outgoing.empty():  # stopping: what is queued still goes out
                await socket_.send(self._outgoing.get_nowait().to_json())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, socket_: ClientConnection, protocol: SessionProtocol, backoff: Backoff) -> None:
        while True:
            try:
                # Not wait_for: in Python 3.11 it can swallow a cancellation that meets a message.
                async with asyncio.timeout(max(0.0, protocol.dead_at - time.monotonic())):
                    message = await socket_.recv()
            except TimeoutError:
                raise ProtocolError(f"no frame from the studio for {self._timings.dead_peer_s:g} s") from None
            try:
                event = protocol.receive(message, time.monotonic())
            except FrameError as error:
                log.warning("frame dropped", extra={"op": "session", "error": str(error)})
                continue
            if isinstance(event, Welcomed):
                backoff.reset()
                log.info("session open", extra={"op": "session", "worker_id": event.worker_id})
                self._on_state("connected")
                self._beat_now(protocol)
            elif isinstance(event, Offered):
                self._answer(protocol, event)

    def _answer(self, protocol: SessionProtocol, offer: Offered) -> None:
        judgement = judge(offer.claim, self._situation())
        match judgement:
            case Take(job):
                self._outgoing.put_nowait(protocol.accept(job.job_id))
                self._desk.put(job)
                log.info("job accepted", extra=_facts(job.job_id, model=job.model))
            case AlreadyOurs(job_id):
                self._outgoing.put_nowait(protocol.accept(job_id))
                log.info("job offered again", extra=_facts(job_id))
                self._on_redelivery()
            case Refuse(job_id, reason, code):
                self._outgoing.put_nowait(protocol.reject(job_id, reason, code))
                log.info("job rejected", extra=_facts(job_id, reason=reason, code=code))
            case Impossible(job_id, error):
                self._outgoing.put_nowait(protocol.accept(job_id))
                failure = protocol.fail(job_id, error, retryable=False)
                assert failure is not None
                self._outgoing.put_nowait(failure)
                log.error("job failed", extra=_facts(job_id, outcome="failed", error=error, retryable=False))
            case Ignore(reason):
                log.warning("offer dropped", extra={"op": "session", "reason": reason})

    async def _send(self, socket_: ClientConnection) -> None:
        while True:
            frame = await self._outgoing.get()
            await socket_.send(frame.to_json())

    async def _beat(self, protocol: SessionProtocol) -> None:
        while True:
            await asyncio.sleep(self._timings.heartbeat_s)
            self._beat_now(protocol)

    def _beat_now(self, protocol: SessionProtocol) -> None:
        if protocol.state is State.OPEN:
            current = self._desk.current_job_id or self._uploading()
            self._outgoing.put_nowait(protocol.heartbeat(self._capabilities(), current))

    async def _ship(self, protocol: SessionProtocol) -> None:
        while True:
            await asyncio.sleep(self._timings.log_batch_s)
            if protocol.state is not State.OPEN:
                continue
            if entries := next_batch(self._shipping):
                self._outgoing.put_nowait(protocol.log_batch(entries))

    def _fail(self, job_id: str, error: str, retryable: bool) -> None:
        frame = None
        if self._protocol is not None and self._protocol.state is State.OPEN:
            frame = self._protocol.fail(job_id, error, retryable=retryable)
        if frame is None:
            log.info("failure not reported: the studio has put the job back", extra=_facts(job_id))
        else:
            self._outgoing.put_nowait(frame)

    def _delivered(self, job_id: str) -> None:
        if self._protocol is not None:
            self._protocol.delivered(job_id)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


def _facts(job_id: str, **more: object) -> dict[str, object]:
    return {"op": "job", "job_id": job_id, **{k: v for k, v in more.items() if v is not None}}
