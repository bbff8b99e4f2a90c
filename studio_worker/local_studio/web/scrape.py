"""``/metrics``: what Prometheus asks each process of a studio, with the token that people have too."""

from __future__ import annotations

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from studio_worker.local_studio.metrics import Metrics

PATH = "/metrics"
_THREADS = 2
"""Of its own, as health's are."""


class Scrape:
    """The one route of these metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._threads = CapacityLimiter(_THREADS)

    def routes(self) -> list[BaseRoute]:
        """What the application serves of these."""
        return [Route(PATH, self.metrics)]

    async def metrics(self, request: Request) -> Response:
        """All samples, as whoever asks can read them."""
        accept = request.headers.get("accept", "")
        media_type, text = await to_thread.run_sync(self._metrics.answer, accept, limiter=self._threads)
        return Response(text, headers={"Content-Type": media_type})
