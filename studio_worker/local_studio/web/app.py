"""The web application: both halves of the interface, the page, and how failures are told."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from studio_worker.files import DISK_TROUBLES
from studio_worker.local_studio.pictures import StorageAway, StorageFull
from studio_worker.local_studio.studio import Studio
from studio_worker.local_studio.web import bodies
from studio_worker.local_studio.web.access import Access, Guard, error_response
from studio_worker.local_studio.web.counted import Counted
from studio_worker.local_studio.web.health import Health
from studio_worker.local_studio.web.mistakes import Mistakes, mistake, path_of
from studio_worker.local_studio.web.people_routes import PeopleRoutes
from studio_worker.local_studio.web.scrape import Scrape
from studio_worker.local_studio.web.shelf_routes import ShelfRoutes
from studio_worker.local_studio.web.stored import Stored
from studio_worker.local_studio.web.worker_routes import WorkerRoutes

logger = logging.getLogger(__name__)

AWAY_RETRY_S = 10
"""A storage that is away comes back by itself, or by hand; workers wait longer by themselves."""

_PAGE = files("studio_worker.local_studio") / "page"
_PAGE_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def build_app(
    studio: Studio, *, access: Access, models_dir: Path | None = None, auto_approve: bool = False
) -> ASGIApp:
    """The studio's ASGI application.

    Args:
        models_dir: folder whose files are served under ``/models``.
        auto_approve: let every machine in that asks.
    """
    workers = WorkerRoutes(
        studio.registry,
        studio.queue,
        studio.sessions,
        studio.attendance,
        studio.approve if auto_approve else None,
    )
    stored = Stored(studio.pictures)
    people = PeopleRoutes(studio, stored)
    shelf = ShelfRoutes(studio, stored, models_dir)
    health = Health(studio)
    app = Starlette(
        routes=[
            *workers.routes(),
            *people.routes(),
            *shelf.routes(),
            *health.routes(),
            *Scrape(studio.metrics).routes(),
            *_page_routes(access),
        ],
        middleware=[
            Middleware(Guard, access=access, login_page=_page_text("login.html")),
            Middleware(Mistakes),
        ],
        exception_handlers={
            HTTPException: _http_error,
            ClientDisconnect: _client_left,
            StorageAway: _storage_away,
            StorageFull: _storage_full,
            OSError: _storage_full,
        },
    )
    return Counted(app, studio.metrics.answered)


def _page_routes(access: Access) -> list[BaseRoute]:
    index = _page_text("index.html")
    assets = {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in _PAGE.iterdir()
        if Path(entry.name).suffix in _PAGE_TYPES
    }

    async def page(_request: Request) -> Response:
        return Response(index, media_type="text/html")

    async def asset(request: Request) -> Response:
        name: str = request.path_params["name"]
        if name not in assets:
            raise HTTPException(404, "no such page file")
        media_type = _PAGE_TYPES[Path(name).suffix]
        return Response(assets[name], media_type=media_type, headers={"Cache-Control": "no-cache"})

    async def login(request: Request) -> Response:
        fields = await bodies.read_fields(request)
        if access.is_token(fields.get("token", "").strip()):
            return access.admit(request.url.scheme == "https")
        return Response(_page_text("login.html"), status_code=401, media_type="text/html")

    return [Route("/", page), Route("/page/{name}", asset), Route("/login", login, methods=["POST"])]


def _page_text(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, error.detail, error.headers)


async def _client_left(_request: Request, _error: Exception) -> Response:
    return error_response(400, "the body ended early")  # nobody reads it; the log stays free of tracebacks


async def _storage_away(request: Request, error: Exception) -> Response:
    logger.error("storage away", extra={"path": path_of(request), "error": str(error)})
    return error_response(503, StorageAway.for_strangers, {"Retry-After": str(AWAY_RETRY_S)})


async def _storage_full(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno not in DISK_TROUBLES:
        return mistake(request, error)
    # The worker keeps its picture and comes again.
    logger.error("nothing can be stored", extra={"path": path_of(request), "error": str(error)})
    return error_response(507, StorageFull.for_strangers)
