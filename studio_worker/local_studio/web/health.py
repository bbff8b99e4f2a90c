"""What a load balancer asks, without a token: whether this studio lives, and whether it takes work."""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from studio_worker.errors import StudioWorkerError
from studio_worker.local_studio.studio import Studio
from studio_worker.local_studio.web.access import error_response

PREFIX = "/health/"
LIMIT_S = 5.0
"""A database that does not answer for so long is no help to anybody."""


class Health:
    """``/health/live`` and ``/health/ready``. They tell nothing that a stranger may not know."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def routes(self) -> list[BaseRoute]:
        """What the application serves of these."""
        return [Route(f"{PREFIX}live", self.live), Route(f"{PREFIX}ready", self.ready)]

    async def live(self, _request: Request) -> Response:
        """The server answers: nothing is gained by starting it anew."""
        return JSONResponse({"status": "live"})

    async def ready(self, _request: Request) -> Response:
        """Workers and people may be sent here."""
        if self._studio.attendance.is_leaving:
            return error_response(503, "the studio is being stopped")
        try:
            async with asyncio.timeout(LIMIT_S):
                await run_in_threadpool(self._studio.database.check)
        except (SQLAlchemyError, StudioWorkerError, TimeoutError):
            return error_response(503, "the studio's database does not answer")
        return JSONResponse({"status": "ready"})
