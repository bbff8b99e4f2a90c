"""``/metrics``: what Prometheus asks each process of a studio, with the token that people have too."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from studio_worker.local_studio.metrics import Metrics

PATH = "/metrics"


class Scrape:
    """The one route of these metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def routes(self) -> list[BaseRoute]:
        """What the application serves of these."""
        return [Route(PATH, self.metrics)]

    async def metrics(self, request: Request) -> Response:
        """All samples, as whoever asks can read them."""
        accept = request.headers.get("accept", "")
        media_type, text = await run_in_threadpool(self._metrics.answer, accept)
        return Response(text, headers={"Content-Type": media_type})
