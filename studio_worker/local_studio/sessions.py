"""Worker sessions: who is connected, what each frame does, when a job is offered.

Each session is one task that takes one event at a time, a frame from its worker or a command from elsewhere
in the studio, so no two steps of a session ever overlap. All state that must survive is in the database.

A second session of the same worker ends the *first* with ``duplicate_worker``. The protocol's times imply
it: a worker gives a silent connection up after 20 s and comes back, while the studio notices only after
30 s; were the newcomer turned away with 4003, which is final, a short network outage would end a worker for
good. Of two machines that share one identity, the older session ends, and its operator learns why.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.websockets import WebSocket

from studio_worker.errors import FrameError
from studio_worker.local_studio.changes import Changes
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import StorageFull
from studio_worker.local_studio.rules import LOST_CONNECTION, RESTARTED, JobStatus, QueuedJob, RuleBroken
from studio_worker.local_studio.session import EndSession, WorkerGone, WorkerSession
from studio_worker.local_studio.shelf import Shelf
from studio_worker.local_studio.turns import PATIENCE, Patience
from studio_worker.local_studio.web.access import bearer, error_response, http_base
from studio_worker.local_studio.workers import Standing, Workers
from studio_worker.studio import wire

logger = logging.getLogger(__name__)
storage_logger = logger.getChild("storage")


@dataclass(frozen=True)
class Limits:
    """How often a studio has a job tried that does not say so itself, and how long it waits.

    A session whose last heartbeat is older than ``heartbeat_timeout_s`` is closed; a new connection may wait
    with its ``hello`` for ``hello_timeout_s``. ``patience`` is for better workers.
    """

    max_attempts: int = 3
    heartbeat_timeout_s: float = wire.STUDIO_HEARTBEAT_TIMEOUT_S
    hello_timeout_s: float = 15.0
    patience: Patience = PATIENCE


UPLOADED_KINDS = ("image", "audio_tts", "video")
"""Tasks whose result comes as a multipart upload; the others come as ``completeJson``."""

_URL_FIELDS = ("initImageUrl", "maskUrl", "refImageUrl", "inputUrl")


class Sessions:
    """All sessions of this studio. Belongs to the server's event loop; any thread may call :meth:`end`."""

    def __init__(
        self,
        workers: Workers,
        queue: JobQueue,
        shelf: Shelf,
        changes: Changes,
        limits: Limits,
    ) -> None:
        self._workers = workers
        self._queue = queue
        self._shelf = shelf
        self._changes = changes
        self._limits = limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self.live: dict[str, WorkerSession] = {}
        self.is_stopping = False

    async def serve(self, socket: WebSocket) -> None:
        """One upgrade request, from its credentials to its last frame."""
        worker_id = str(socket.path_params["worker_id"])
        if self._workers.standing(worker_id, bearer(socket.headers)) is Standing.REFUSED:
            await socket.send_denial_response(error_response(401, "unknown worker or wrong token"))
            return
        if wire.SUBPROTOCOL not in socket.scope["subprotocols"]:
            await socket.send_denial_response(
                error_response(400, f"the sub-protocol {wire.SUBPROTOCOL} is required")
            )
            return
        self._loop = asyncio.get_running_loop()
        await socket.accept(subprotocol=wire.SUBPROTOCOL)
        session = WorkerSession(worker_id, socket, http_base(socket))
        try:
            await self._greet(session)
            while True:
                await self._step(session)
        except WorkerGone:
            logger.info("worker disconnected", extra={"worker_id": worker_id})
        except EndSession as end:
            await session.close(end)
        except Exception:
            logger.exception("session failed", extra={"worker_id": worker_id})
            await session.close(EndSession("internal_error", "the studio made a mistake"))
        finally:
            session.stop_listening()
            if self.live.get(worker_id) is session:
                self._leave(session)

    def offer_soon(self, worker_id: str) -> None:
        """Its job is done: offer the next one by itself. Only from the server's event loop."""
        session = self.live.get(worker_id)
        if session is not None:
            session.commands.put_nowait("offer")

    def end(self, worker_id: str, code: wire.ErrorCode, message: str) -> None:
        """End this worker's session, if it has one. From any thread."""
        session = self.live.get(worker_id)
        if session is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(session.commands.put_nowait, EndSession(code, message))

    # --- one session --------------------------------------------------------------------------------

    async def _greet(self, session: WorkerSession) -> None:
        session.deadline = time.monotonic() + self._limits.hello_timeout_s
        try:
            hello = await session.next_event()
        except FrameError as error:
            raise EndSession("protocol_violation", f"hello must come first ({error})") from error
        except TimeoutError as error:
            raise EndSession("protocol_violation", "no hello came") from error
        if not isinstance(hello, wire.Hello):
            raise EndSession("protocol_violation", "hello must come first, and alone until welcome")
        standing = self._workers.standing(session.worker_id, hello.auth_token)
        if standing is Standing.REFUSED:
            raise EndSession("auth_failed", "the token is not this worker's")
        if standing is Standing.DELETED:
            raise EndSession("worker_deleted", "this worker was deleted from the studio")
        self._enter(session)
        self._heard(session, hello.capabilities)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        await session.send(wire.Welcome(worker_id=session.worker_id, server_time=now))
        logger.info(
            "worker connected",
            extra={"worker_id": session.worker_id, "agent_version": hello.capabilities.agent_version},
        )

    async def _step(self, session: WorkerSession) -> None:
        try:
            event = await session.next_event()
        except FrameError as error:
            # Not a violation: a worker of a later version may know frames that this studio does not.
            logger.warning("frame dropped", extra={"worker_id": session.worker_id, "reason": str(error)})
            return
        except TimeoutError as error:
            raise EndSession(None, f"no heartbeat for {self._limits.heartbeat_timeout_s:g} s") from error
        if self.live.get(session.worker_id) is not session:
            return  # replaced: its claims are gone, and the command that ends it is on its way
        try:
            await self._act(session, event)
        except RuleBroken as error:
            raise EndSession("protocol_violation", str(error)) from error
        except StorageFull as error:
            _cannot_store(session, error)
            if isinstance(event, wire.Fail | wire.CompleteJson):  # without an answer the worker says it again
                raise EndSession("internal_error", "the studio's disk is full") from error

    async def _act(self, session: WorkerSession, event: wire.WorkerFrame | Literal["offer"]) -> None:
        match event:
            case "offer":
                await self._offer(session)
            case wire.Heartbeat():
                session.current_job_id = event.current_job_id
                self._heard(session, event.capabilities)
                await session.send(wire.HeartbeatAck())
                if event.current_job_id is None:
                    await self._offer(session)
            case wire.Accept():
                self._queue.accept(event.job_id, session.worker_id)
            case wire.Reject():
                self._reject(session, event)
            case wire.Fail():
                self._queue.fail(event.job_id, session.worker_id, event.error, retryable=event.retryable)
                extra = {"worker_id": session.worker_id, "job_id": event.job_id, "retryable": event.retryable}
                logger.info("job failed", extra=extra)
                await session.send(wire.FailAck(job_id=event.job_id))
            case wire.CompleteJson():
                self._complete(session, event)
                await session.send(wire.CompleteAck(job_id=event.job_id))
                await self._offer(session)
            case wire.LogBatch():
                self._shelf.add_logs(session.worker_id, event.entries)
            case wire.Hello():
                raise EndSession("protocol_violation", "hello comes once")

    def _reject(self, session: WorkerSession, frame: wire.Reject) -> None:
        extra = {"worker_id": session.worker_id, "job_id": frame.job_id, "code": frame.code}
        job = self._queue.get(frame.job_id)
        if job is None or not job.is_held_by(session.worker_id):
            # Not on the protocol's list of violations: the job may have been deleted or released meanwhile.
            logger.warning("stray reject dropped", extra=extra)
            return
        if frame.code is not None:
            self._queue.decline(frame.job_id, session.worker_id)
        else:
            name = session.capabilities.machine_name if session.capabilities else ""
            after = self._queue.reject(
                frame.job_id, session.worker_id, frame.reason, name=name, connected=self.live.keys()
            )
            if after.status is JobStatus.QUEUED:
                self._ask_others(session)
        logger.info("job rejected", extra=extra)

    def _ask_others(self, session: WorkerSession) -> None:
        """Somebody else may want it; this worker is not asked before its next heartbeat."""
        for other in self.live.values():
            if other is not session and other.current_job_id is None:
                other.commands.put_nowait("offer")

    def _complete(self, session: WorkerSession, frame: wire.CompleteJson) -> None:
        job = self._queue.get(frame.job_id)
        if job is None or not job.is_held_by(session.worker_id):
            raise RuleBroken(f"job {frame.job_id} is not held by this worker")
        if job.kind in UPLOADED_KINDS:
            raise RuleBroken(f"the result of a job of kind {job.kind} is delivered by upload")
        try:
            content = json.dumps(frame.result, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise RuleBroken("the result holds numbers that JSON does not know") from error
        self._queue.deliver(
            frame.job_id, session.worker_id, io.BytesIO(content), ext="json", prompt=frame.prompt
        )
        logger.info("job done", extra={"worker_id": session.worker_id, "job_id": frame.job_id})

    async def _offer(self, session: WorkerSession) -> None:
        # A paused worker is not asked: it would only say so again, at every heartbeat.
        if session.is_paused:
            return
        ready = [worker_id for worker_id, each in self.live.items() if not each.is_paused]
        job = self._queue.take_next(session.worker_id, ready)
        if job is not None:
            logger.info("job offered", extra={"worker_id": session.worker_id, "job_id": job.job_id})
            await session.send(wire.Offer(claim=claim_of(job, session.base_url)))

    def _heard(self, session: WorkerSession, capabilities: wire.Capabilities) -> None:
        session.capabilities = capabilities
        session.heartbeat_at = time.time()
        session.deadline = time.monotonic() + self._limits.heartbeat_timeout_s
        try:
            self._workers.seen(session.worker_id, capabilities)
        except StorageFull as error:  # the worker is here all the same
            _cannot_store(session, error)

    def _enter(self, session: WorkerSession) -> None:
        older = self.live.get(session.worker_id)
        if older is not None:
            # Its claims go now, not when it has closed: by then this session may hold one of its own.
            self._leave(older)
            older.commands.put_nowait(EndSession("duplicate_worker", "another session of this worker began"))
        self.live[session.worker_id] = session

    def _leave(self, session: WorkerSession) -> None:
        # In this order: whoever sees the worker offline finds its job released already.
        try:
            reason = RESTARTED if self.is_stopping else LOST_CONNECTION
            self._queue.release(session.worker_id, reason, counts=not self.is_stopping)
        except StorageFull as error:  # the claim stays; the worker delivers it, or a restart releases it
            _cannot_store(session, error)
        finally:
            del self.live[session.worker_id]
            self._changes.bump()


def _cannot_store(session: WorkerSession, error: StorageFull) -> None:
    storage_logger.error("nothing can be stored", extra={"worker_id": session.worker_id, "error": str(error)})


def claim_of(job: QueuedJob, base_url: str) -> dict[str, Any]:
    """An offer's claim. Addresses that begin with ``/`` are this studio's own, completed for the worker."""

    def absolute(address: Any) -> Any:
        return base_url + address if isinstance(address, str) and address.startswith("/") else address

    task = {key: absolute(value) if key in _URL_FIELDS else value for key, value in job.task.items()}
    source = dict(job.model_source)
    source["files"] = [{**file, "url": absolute(file.get("url"))} for file in source.get("files", ())]
    return {
        "jobId": job.job_id,
        "gameId": job.game_id,
        "assetName": job.asset_name,
        "model": job.model,
        "vramGbEstimate": job.vram_gb_estimate,
        "task": {"kind": job.kind, **task},
        "modelSource": source,
    }
