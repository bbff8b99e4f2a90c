"""Files of this studio as answers: piece by piece, whole or by Range, and never anything but bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from studio_worker.local_studio.web.access import CONTENT_CSP

_FOREVER = {"Cache-Control": "private, max-age=31536000, immutable", "Content-Security-Policy": CONTENT_CSP}
"""Headers of stored pictures: an id never gets other bytes."""


async def picture(path: Path, media_type: str, headers: Mapping[str, str] | None = None) -> Response:
    """A stored picture. Raises HTTPException 404 where its file was taken away."""
    if not await run_in_threadpool(is_file, path):
        raise HTTPException(404, "the picture's file is not in the studio's folder any more")
    return FileResponse(path, media_type=media_type, headers={**_FOREVER, **(headers or {})})


def is_file(path: Path) -> bool:
    """Whether there is one, whatever was asked for."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than any file's
        return False
