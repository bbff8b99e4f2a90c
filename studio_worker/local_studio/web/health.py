"""What a load balancer asks, without a token: whether this studio lives, and whether it takes work."""

from __future__ import annotations

import asyncio

from anyio import CapacityLimiter, to_thread
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from studio_worker.errors import StudioWorkerError
from studio_worker.local_studio.studio import Studio
from studio_worker.local_studio.web.access import error_response

PREFIX = "/health/"
LIMIT_S = 5.0
"""A database that does not answer for so long is no help to anybody."""
_THREADS = 4
"""Of its own: the common ones may all wait for a disk that hangs, which is no reason to send people away."""


class Health:
    """``/health/live`` and ``/health/ready``. They tell nothing that a stranger may not know."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._threads = CapacityLimiter(_THREADS)

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
                await to_thread.run_sync(self._studio.database.check, limiter=self._threads)
        except (SQLAlchemyError, StudioWorkerError, TimeoutError):
            return error_response(503, "the studio's database does not answer")
        return JSONResponse({"status": "ready"})
