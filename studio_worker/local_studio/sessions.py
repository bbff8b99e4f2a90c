"""Worker sessions: who is connected, what each frame does, when a job is offered.

Each session is one task that takes one event at a time, a frame from its worker or a command from elsewhere
in the studio, so no two steps of a session ever overlap. All state that must survive is in the database, and
all that other studio processes must know. How sessions come and go is :mod:`attendance`'s.

A second session of the same worker ends the *first* with ``duplicate_worker``. The protocol's times imply
it: a worker gives a silent connection up after 20 s and comes back, while the studio notices only after
30 s; were the newcomer turned away with 4003, which is final, a short network outage would end a worker for
good. Of two machines that share one identity, the older session ends, and its operator learns why. The job in
hand is the newcomer's, for as long as its heartbeats name it.
"""

from __future__ import annotations

import io
import json
import logging
import time
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from anyio import CapacityLimiter, to_thread
from starlette.websockets import WebSocket

from studio_worker.errors import FrameError
from studio_worker.local_studio.attendance import Attendance, cannot_store, ended
from studio_worker.local_studio.claim import claim_of
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.leases import Replaced
from studio_worker.local_studio.limits import Limits
from studio_worker.local_studio.pictures import CannotStore
from studio_worker.local_studio.presence import Presence
from studio_worker.local_studio.rules import JobStatus, RuleBroken
from studio_worker.local_studio.session import EndSession, WorkerGone, WorkerSession
from studio_worker.local_studio.shelf import Shelf
from studio_worker.local_studio.web.access import bearer, error_response, http_base
from studio_worker.local_studio.workers import Standing, Workers
from studio_worker.studio import wire

logger = logging.getLogger(__name__)


UPLOADED_KINDS = ("image", "audio_tts", "video")
"""Tasks whose result comes as a multipart upload; the others come as ``completeJson``."""

RESULTS = 8
"""Of the others so many are stored at once, as worker_routes.UPLOADS are of those."""

_STEPS = (wire.Accept, wire.Reject, wire.Fail, wire.CompleteJson)
"""What says something of a job."""


class Sessions:
    """Serves the sessions of this process, on the server's event loop."""

    def __init__(
        self,
        workers: Workers,
        queue: JobQueue,
        shelf: Shelf,
        presence: Presence,
        attendance: Attendance,
        limits: Limits,
    ) -> None:
        self._workers = workers
        self._queue = queue
        self._shelf = shelf
        self._presence = presence
        self._attendance = attendance
        self._limits = limits
        self._results = CapacityLimiter(RESULTS)

    async def serve(self, socket: WebSocket) -> None:
        """One upgrade request, from its credentials to its last frame."""
        worker_id = str(socket.path_params["worker_id"])
        try:
            standing = self._workers.standing(worker_id, bearer(socket.headers))
        except CannotStore as error:
            await socket.send_denial_response(error_response(503, error.for_strangers))
            return
        if standing is Standing.REFUSED:
            await socket.send_denial_response(error_response(401, "unknown worker or wrong token"))
            return
        if wire.SUBPROTOCOL not in socket.scope["subprotocols"]:
            await socket.send_denial_response(
                error_response(400, f"the sub-protocol {wire.SUBPROTOCOL} is required")
            )
            return
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
        except CannotStore as error:
            cannot_store(session, error)
            await session.close(EndSession("internal_error", error.for_strangers))
        except Exception:
            logger.exception("session failed", extra={"worker_id": worker_id})
            await session.close(EndSession("internal_error", "the studio made a mistake"))
        finally:
            session.stop_listening()
            self._attendance.leave(session)

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
        self._listen(session, hello.capabilities)
        self._attendance.enter(session, hello.capabilities)
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
        if not self._attendance.has(session):
            return  # replaced: its claims are gone, and the command that ends it is on its way
        try:
            if isinstance(event, wire.Reject | wire.Fail):
                session.has_ended(event.job_id)
            if isinstance(event, _STEPS):
                with session.doubting():
                    self._presence.check(session.worker_id, session.number)
            await self._act(session, event)
        except Replaced as over:  # a late word of an older session: it breaks no rule, and changes nothing
            raise ended(over) from over
        except RuleBroken as error:
            raise EndSession("protocol_violation", str(error)) from error
        except CannotStore as error:
            cannot_store(session, error)
            if isinstance(event, wire.Fail | wire.CompleteJson):  # without an answer the worker says it again
                raise EndSession("internal_error", error.for_strangers) from error

    async def _act(self, session: WorkerSession, event: wire.WorkerFrame | Literal["offer"]) -> None:
        match event:
            case "offer":
                await self._offer(session, is_renewed=False)
            case wire.Heartbeat():
                self._listen(session, event.capabilities)
                self._attendance.heard(session, event)
                await session.send(wire.HeartbeatAck())
                if event.current_job_id is None:
                    await self._offer(session)
            case wire.Accept():
                self._queue.accept(event.job_id, session.worker_id)
            case wire.Reject():
                with session.doubting():
                    self._reject(session, event)
            case wire.Fail():
                self._queue.fail(event.job_id, session.worker_id, event.error, retryable=event.retryable)
                extra = {"worker_id": session.worker_id, "job_id": event.job_id, "retryable": event.retryable}
                logger.info("job failed", extra=extra)
                await session.send(wire.FailAck(job_id=event.job_id))
            case wire.CompleteJson():
                await self._complete(session, event)
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
            connected = self._presence.connected().keys()
            after = self._queue.reject(
                frame.job_id, session.worker_id, frame.reason, name=name, connected=connected
            )
            if after.status is JobStatus.QUEUED:
                # Somebody else may want it; this worker is not asked before its next heartbeat.
                self._attendance.offer_others(session.worker_id)
        logger.info("job rejected", extra=extra)

    async def _complete(self, session: WorkerSession, frame: wire.CompleteJson) -> None:
        job = self._queue.get(frame.job_id)
        if job is None or not job.is_held_by(session.worker_id):
            raise RuleBroken(f"job {frame.job_id} is not held by this worker")
        if job.kind in UPLOADED_KINDS:
            raise RuleBroken(f"the result of a job of kind {job.kind} is delivered by upload")
        try:
            content = io.BytesIO(json.dumps(frame.result, ensure_ascii=False, allow_nan=False).encode())
        except ValueError as error:
            raise RuleBroken("the result holds numbers that JSON does not know") from error
        # In a thread: what keeps the results may be on the network, and other sessions go on.
        deliver = partial(
            self._queue.deliver, frame.job_id, session.worker_id, content, ext="json", prompt=frame.prompt
        )
        await to_thread.run_sync(deliver, limiter=self._results)
        logger.info("job done", extra={"worker_id": session.worker_id, "job_id": frame.job_id})

    async def _offer(self, session: WorkerSession, *, is_renewed: bool = True) -> None:
        # A paused worker is not asked: it would only say so again, at every heartbeat.
        if session.is_paused:
            return
        if not self._queue.lookout.sees_one_for(session.worker_id, self._presence.ready):
            return
        if not is_renewed:
            self._presence.check(session.worker_id, session.number)
        with session.doubting():
            job = self._queue.take_next(session.worker_id, self._presence.ready, session_no=session.number)
            if job is None:
                return
            claim = claim_of(self._shelf.addressed(job), session.base_url)
        self._attendance.offered(session, job)
        logger.info("job offered", extra={"worker_id": session.worker_id, "job_id": job.job_id})
        await session.send(wire.Offer(claim=claim))

    def _listen(self, session: WorkerSession, capabilities: wire.Capabilities) -> None:
        session.capabilities = capabilities
        session.deadline = time.monotonic() + self._limits.heartbeat_timeout_s
