"""What workers call, under ``/graphics/api``: registration, the session, the delivery of bytes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from typing import IO, Any

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from studio_worker.local_studio.attendance import Attendance
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.registry import Registry, TooManyPending, UnknownRequest, WrongSecret
from studio_worker.local_studio.rules import QueuedJob, RuleBroken, UnknownJob
from studio_worker.local_studio.session import is_finite
from studio_worker.local_studio.sessions import UPLOADED_KINDS, Sessions
from studio_worker.local_studio.web import bodies
from studio_worker.local_studio.web.access import bearer, error_response
from studio_worker.local_studio.workers import Standing
from studio_worker.network.crowd import origin_of
from studio_worker.studio import wire

logger = logging.getLogger(__name__)

PREFIX = "/graphics/api"
RETRY_AFTER_S = 30

UPLOADS = 16
"""Deliveries that are stored at once; others wait. Were they all the threads there are (40, Starlette's), a
storage that hangs would take the page and the probes with it.
"""

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_MAX_ID_CHARS = 200
_MAX_NAME_CHARS = 200


class WorkerRoutes:
    """The worker's half of the HTTP interface.

    Args:
        approve: called with the request id of every new request where machines are let in unasked.
    """

    def __init__(
        self,
        registry: Registry,
        queue: JobQueue,
        sessions: Sessions,
        attendance: Attendance,
        approve: Callable[[str], object] | None,
    ) -> None:
        self._registry = registry
        self._queue = queue
        self._sessions = sessions
        self._attendance = attendance
        self._approve = approve
        self._uploads = CapacityLimiter(UPLOADS)

    def routes(self) -> list[BaseRoute]:
        """What the application serves of these."""
        workers = f"{PREFIX}/workers"
        return [
            Route(f"{workers}/register-request", self.register, methods=["POST"]),
            Route(f"{workers}/register-requests/{{request_id}}", self.poll),
            WebSocketRoute(f"{workers}/{{worker_id}}/connect", self._sessions.serve),
            Route(f"{workers}/{{worker_id}}/jobs/{{job_id}}/complete", self.complete, methods=["POST"]),
        ]

    async def register(self, request: Request) -> Response:
        """A machine asks to work here."""
        body = await bodies.read_body(request, wire.RegisterRequest, bodies.MAX_REGISTRATION_BYTES)
        if not 1 <= len(body.install_id) <= _MAX_ID_CHARS:
            raise HTTPException(400, f"installId: must have 1 to {_MAX_ID_CHARS} characters")
        if not _SHA256.fullmatch(body.registration_secret_hash):
            raise HTTPException(400, "registrationSecretHash: must be 64 hexadecimal digits")
        if not is_finite(body.capabilities):
            raise HTTPException(400, "capabilities: a memory size is not a number")
        if too_long := _too_long(body):
            raise HTTPException(400, f"{too_long}: must have at most {_MAX_NAME_CHARS} characters")
        origin = origin_of(request.client.host if request.client else "")
        try:
            registration = self._registry.request(body, origin)
        except TooManyPending as error:
            return error_response(429, str(error), {"Retry-After": str(RETRY_AFTER_S)})
        logger.info("registration requested", extra={"request_id": registration.request_id})
        if self._approve is not None and registration.status == "pending":
            self._approve(registration.request_id)
        return _wired(wire.RegisterAnswer(request_id=registration.request_id))

    async def poll(self, request: Request) -> Response:
        """Has it been decided?"""
        try:
            decision = self._registry.decision(request.path_params["request_id"], bearer(request.headers))
        except UnknownRequest as error:
            raise HTTPException(404, str(error)) from None
        except WrongSecret as error:
            raise HTTPException(401, str(error)) from None
        return _wired(decision)

    async def complete(self, request: Request) -> Response:
        """The bytes of a finished job. Every refusal comes after the whole body was read."""
        worker_id, job_id = request.path_params["worker_id"], request.path_params["job_id"]
        if self._registry.workers.standing(worker_id, bearer(request.headers)) is not Standing.KNOWN:
            await bodies.drain(request)
            raise HTTPException(401, "unknown worker or wrong token")
        job = self._queue.get(job_id)
        if job is None:
            await bodies.drain(request)
            raise HTTPException(404, "the job is unknown")
        if job.may_be_delivered_by(worker_id):
            result = await self._keep(request, job, worker_id)
            if result is not None:
                self._attendance.offer_soon(worker_id)
                return result
        else:
            await bodies.drain(request)
        try:
            self._queue.count_refused_upload(job_id)
        except UnknownJob:  # it was deleted meanwhile
            raise HTTPException(404, "the job is unknown") from None
        logger.info("upload refused", extra={"worker_id": worker_id, "job_id": job_id})
        raise HTTPException(409, "the job is no longer this worker's")

    async def _keep(self, request: Request, job: QueuedJob, worker_id: str) -> Response | None:
        async with bodies.read_form(request, bodies.MAX_UPLOAD_BYTES) as form:
            content, fields = _parts(form, job)
            try:
                # In a thread: up to 100 MiB go to the disk, and heartbeats must be acknowledged meanwhile.
                deliver = partial(self._queue.deliver, job.job_id, worker_id, content, **fields)
                result = await to_thread.run_sync(deliver, limiter=self._uploads)
            except RuleBroken:
                return None
        logger.info(
            "job done",
            extra={
                "worker_id": worker_id,
                "job_id": job.job_id,
                "size_bytes": result.size_bytes,
                "duration_s": result.seconds,
            },
        )
        return JSONResponse({"jobId": job.job_id, "status": "done"})


def _too_long(body: wire.RegisterRequest) -> str:
    """Which of the names that a page shows is longer than any real one; empty where none is."""
    names = {
        "capabilities.machineName": body.capabilities.machine_name,
        "capabilities.username": body.capabilities.username,
        "capabilities.agentVersion": body.capabilities.agent_version,
        "userAgent": body.user_agent,
    }
    return next((name for name, text in names.items() if len(text) > _MAX_NAME_CHARS), "")


def _parts(form: FormData, job: QueuedJob) -> tuple[IO[bytes], dict[str, Any]]:
    image, ext = form.get("image"), form.get("ext")
    prompt, meta = form.get("prompt"), form.get("generationMeta")
    if job.kind not in UPLOADED_KINDS:
        raise HTTPException(400, f"the result of a job of kind {job.kind} is delivered by completeJson")
    if not isinstance(image, UploadFile):
        raise HTTPException(400, "image: the file is missing")
    if not isinstance(ext, str) or not bodies.is_extension(ext):
        raise HTTPException(400, "ext: must be a file name extension like webp")
    if isinstance(prompt, UploadFile) or isinstance(meta, UploadFile):
        raise HTTPException(400, "prompt, generationMeta: must be text fields")
    if not image.size:
        raise HTTPException(400, "image: the file is empty")
    try:
        parsed = None if meta is None else bodies.parse_json(meta)
    except ValueError as error:
        raise HTTPException(400, f"generationMeta: {error}") from None
    return image.file, {"ext": ext, "prompt": prompt, "meta": parsed}


def _wired(body: wire.Body) -> Response:
    return Response(body.to_json(), media_type="application/json")
