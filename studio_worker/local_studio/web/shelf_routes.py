"""Models, input pictures, model files and log lines over HTTP."""

from __future__ import annotations

from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from studio_worker.local_studio.shelf import NotAPicture
from studio_worker.local_studio.studio import Studio
from studio_worker.local_studio.web import bodies, views
from studio_worker.local_studio.web.access import CONTENT_CSP, http_base
from studio_worker.local_studio.web.bodies import number_in
from studio_worker.local_studio.web.stored import Stored


class ShelfRoutes:
    """What people put down for later, and what workers fetch.

    Args:
        models_dir: folder whose files are served under ``/models``; ``None`` serves none.
    """

    def __init__(self, studio: Studio, stored: Stored, models_dir: Path | None) -> None:
        self._desk = studio
        self._stored = stored
        self._models_dir = models_dir

    def routes(self) -> list[BaseRoute]:
        """What the application serves of these."""
        return [
            Route("/api/models", self.list_models),
            Route("/api/models/{model_id:path}", self.put_model, methods=["PUT"]),
            Route("/api/models/{model_id:path}", self.delete_model, methods=["DELETE"]),
            Route("/api/logs", self.logs),
            Route("/api/files", self.add_file, methods=["POST"]),
            Route("/files/{file_id}", self.file),
            Route("/models/{filename}", self.model_file),
        ]

    async def list_models(self, _request: Request) -> Response:
        """What the form offers."""
        return JSONResponse({"models": [views.model(entry) for entry in self._desk.models()]})

    async def put_model(self, request: Request) -> Response:
        """Add a model, or replace it."""
        model_id: str = request.path_params["model_id"]
        if not 1 <= len(model_id) <= 200:
            raise HTTPException(400, "id: must have 1 to 200 characters")
        body = await bodies.read_body(request, bodies.NewModel)
        try:
            self._desk.register_model(
                model_id, body.model_source, label=body.label, vram_gb_estimate=body.vram_gb_estimate
            )
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse({"id": model_id})

    async def delete_model(self, request: Request) -> Response:
        """Forget a model."""
        if not self._desk.shelf.delete_model(request.path_params["model_id"]):
            raise HTTPException(404, "the model is unknown")
        return Response(status_code=204)

    async def logs(self, request: Request) -> Response:
        """The newest lines that workers shipped."""
        limit = number_in(request, "limit", default=200, low=1, high=5000)
        names = self._desk.registry.workers.names()
        lines = self._desk.logs(request.query_params.get("worker"), limit)
        return JSONResponse({"lines": [views.log_line(line, names) for line in lines]})

    async def add_file(self, request: Request) -> Response:
        """Keep an input picture: a multipart field ``file``, or the bare bytes as the body."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with bodies.read_form(request, bodies.MAX_PICTURE_BYTES) as form:
                upload = form.get("file")
                if not isinstance(upload, UploadFile):
                    raise HTTPException(400, "file: the picture is missing")
                content = await upload.read()
        else:
            content = await bodies.read_bytes(request, bodies.MAX_PICTURE_BYTES)
        try:
            path = await self._stored.run(self._desk.add_picture, content)
        except NotAPicture as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse({"path": path, "url": http_base(request) + path}, status_code=201)

    async def file(self, request: Request) -> Response:
        """An input picture."""
        found = self._desk.shelf.picture(request.path_params["file_id"])
        if found is None:
            raise HTTPException(404, "the file is unknown")
        return await self._stored.picture(request, found.key, found.media_type)

    async def model_file(self, request: Request) -> Response:
        """A model file, whole or by Range."""
        filename: str = request.path_params["filename"]
        is_plain = filename not in ("", ".", "..") and not any(c in filename for c in "/\\\0")
        if self._models_dir is None or not is_plain:
            raise HTTPException(404, "no such model file")
        path = self._models_dir / filename
        if not await run_in_threadpool(_is_file, path):
            raise HTTPException(404, "no such model file")
        return FileResponse(
            path, media_type="application/octet-stream", headers={"Content-Security-Policy": CONTENT_CSP}
        )


def _is_file(path: Path) -> bool:
    """Whether there is one, whatever was asked for."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than any file's
        return False
