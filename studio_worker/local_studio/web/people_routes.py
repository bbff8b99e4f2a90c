"""What people, the page and scripts call about workers and jobs, under ``/api``.

Every answer is JSON but for pictures and the event stream; every refusal is ``{"error": …}``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from studio_worker.local_studio.registry import NotPending, UnknownRequest
from studio_worker.local_studio.rules import JobStatus, RuleBroken, UnknownJob
from studio_worker.local_studio.studio import Studio
from studio_worker.local_studio.web import bodies
from studio_worker.local_studio.web.access import http_base
from studio_worker.local_studio.web.bodies import number_in
from studio_worker.local_studio.web.stored import Stored
from studio_worker.studio import wire

QUIET_S = 10.0
"""After so long without a change an event goes out all the same: the times of heartbeats are shown, and those
that say nothing new ring no bell. Nobody between takes the stream for dead, either.
"""

COALESCE_S = 0.1
"""Changes within this time are told as one."""

ROWS = 30
"""Jobs of one status in the page's state; its counts tell of the others."""


class PeopleRoutes:
    """State, events, registrations, workers, jobs and their results."""

    def __init__(self, studio: Studio, stored: Stored) -> None:
        self._desk = studio
        self._stored = stored

    def routes(self) -> list[BaseRoute]:
        """What the application serves of these."""
        return [
            Route("/api/state", self.state),
            Route("/api/events", self.events),
            Route("/api/registrations/{request_id}/approve", self.approve, methods=["POST"]),
            Route("/api/registrations/{request_id}/reject", self.reject, methods=["POST"]),
            Route("/api/workers/{worker_id}", self.delete_worker, methods=["DELETE"]),
            Route("/api/jobs", self.list_jobs),
            Route("/api/jobs", self.queue_job, methods=["POST"]),
            Route("/api/jobs/{job_id}", self.job),
            Route("/api/jobs/{job_id}", self.delete_job, methods=["DELETE"]),
            Route("/api/jobs/{job_id}/result", self.result),
            Route("/api/jobs/{job_id}/retry", self.retry, methods=["POST"]),
        ]

    # --- state --------------------------------------------------------------------------------------

    async def state(self, request: Request) -> Response:
        """Everything the page shows but for the gallery, models and logs."""
        studio = self._desk
        names, connected = studio.registry.workers.names(), studio.presence.connected()
        active = [
            *studio.queue.listed(JobStatus.RUNNING, ROWS),
            *studio.queue.listed(JobStatus.OFFERED, ROWS),
            *studio.queue.listed(JobStatus.QUEUED, ROWS),
        ]
        return JSONResponse(
            {
                "version": studio.changes.version,
                "baseUrl": http_base(request),
                "registrations": [studio.views.registration(entry) for entry in studio.pending()],
                "workers": studio.views.workers(studio.workers(), connected),
                "queue": studio.queue.counts(),
                "active": studio.views.jobs(active, names, connected),
                "failed": studio.views.jobs(studio.queue.listed(JobStatus.FAILED, ROWS), names, connected),
            }
        )

    async def events(self, _request: Request) -> Response:
        """A server-sent event at every change, and now and then; its data is the number of changes so far."""
        return StreamingResponse(
            self._stream(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )

    async def _stream(self) -> AsyncIterator[str]:
        changes = self._desk.changes
        with changes.listening() as bell:
            yield f"retry: 1000\nevent: change\ndata: {changes.version}\n\n"
            while not self._desk.attendance.is_stopping:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(QUIET_S):
                        await bell.wait()
                await asyncio.sleep(COALESCE_S)
                bell.clear()
                yield f"event: change\ndata: {changes.version}\n\n"

    # --- workers ------------------------------------------------------------------------------------

    async def approve(self, request: Request) -> Response:
        """Let a machine work here."""
        try:
            worker_id = self._desk.approve(request.path_params["request_id"])
        except UnknownRequest as error:
            raise HTTPException(404, str(error)) from None
        except NotPending as error:
            raise HTTPException(409, str(error)) from None
        return JSONResponse({"workerId": worker_id})

    async def reject(self, request: Request) -> Response:
        """Refuse a machine."""
        refusal = await bodies.read_body(request, bodies.Refusal)
        try:
            self._desk.reject(request.path_params["request_id"], refusal.reason)
        except UnknownRequest as error:
            raise HTTPException(404, str(error)) from None
        except NotPending as error:
            raise HTTPException(409, str(error)) from None
        return JSONResponse({"status": "rejected"})

    async def delete_worker(self, request: Request) -> Response:
        """Dismiss a worker."""
        try:
            self._desk.delete_worker(request.path_params["worker_id"])
        except KeyError:
            raise HTTPException(404, "the worker is unknown") from None
        return Response(status_code=204)

    # --- jobs ---------------------------------------------------------------------------------------

    async def list_jobs(self, request: Request) -> Response:
        """Jobs, by status where one is asked for."""
        asked = request.query_params.get("status")
        try:
            status = None if asked is None else JobStatus(asked)
        except ValueError:
            raise HTTPException(400, f"status: must be one of {', '.join(JobStatus)}") from None
        limit = number_in(request, "limit", default=100, low=1, high=1000)
        offset = number_in(request, "offset", default=0, low=0, high=10**9)
        names, connected = self._desk.registry.workers.names(), self._desk.presence.connected()
        jobs = self._desk.queue.listed(status, limit, offset)
        return JSONResponse({"jobs": self._desk.views.jobs(jobs, names, connected)})

    async def queue_job(self, request: Request) -> Response:
        """Put a job in the queue."""
        body = await bodies.read_body(request, bodies.NewJob)
        try:
            job_id = self._desk.queue_job(
                model=body.model,
                task=body.task,
                model_source=body.model_source,
                game_id=body.game_id,
                asset_name=body.asset_name,
                vram_gb_estimate=body.vram_gb_estimate,
                max_attempts=body.max_attempts,
                priority=body.priority,
                submitter=body.submitter,
                job_id=None if body.job_id is None else str(body.job_id),
            )
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except RuleBroken as error:
            raise HTTPException(409, str(error)) from None
        return JSONResponse({"jobId": job_id}, status_code=201)

    async def job(self, request: Request) -> Response:
        """One job."""
        return self._job_answer(request.path_params["job_id"])

    async def delete_job(self, request: Request) -> Response:
        """Take a job out of the queue, or out of the gallery."""
        job_id = self._known(request)
        try:
            await self._stored.run(self._desk.queue.delete, job_id)
        except UnknownJob as error:  # somebody else was faster
            raise HTTPException(404, str(error)) from None
        except RuleBroken as error:
            raise HTTPException(409, str(error)) from None
        return Response(status_code=204)

    async def retry(self, request: Request) -> Response:
        """Queue a failed or rejected job again."""
        job_id = self._known(request)
        try:
            self._desk.retry(job_id)
        except UnknownJob as error:
            raise HTTPException(404, str(error)) from None
        except RuleBroken as error:
            raise HTTPException(409, str(error)) from None
        return self._job_answer(job_id)

    async def result(self, request: Request) -> Response:
        """The bytes a job brought, as what they are."""
        job_id = self._known(request)
        result, key = self._desk.queue.result(job_id), self._desk.queue.picture(job_id)
        if result is None or key is None:
            raise HTTPException(404, "the job has no result yet")
        media_type = "application/json" if result.ext == "json" else wire.mime_type(result.ext)
        disposition = f'inline; filename="{job_id}.{result.ext}"'
        return await self._stored.picture(request, key, media_type, {"Content-Disposition": disposition})

    # --- within -------------------------------------------------------------------------------------

    def _known(self, request: Request) -> str:
        job_id: str = request.path_params["job_id"]
        if self._desk.queue.get(job_id) is None:
            raise HTTPException(404, "the job is unknown")
        return job_id

    def _job_answer(self, job_id: str) -> Response:
        job = self._desk.queue.get(job_id)
        if job is None:
            raise HTTPException(404, "the job is unknown")
        facts: dict[str, Any] = self._desk.views.job(
            job, self._desk.registry.workers.names(), self._desk.presence.connected()
        )
        return JSONResponse(facts)
