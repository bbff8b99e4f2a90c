"""What this studio keeps as answers: piece by piece, whole or by Range, and never anything but bytes.

Bytes that lie elsewhere go through the studio all the same: the browser needs no way to the storage, learns
no address of it, and no cookie of the studio's can reach it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Send

from studio_worker.local_studio.pictures import CannotStore, PictureGone, Pictures, RangeRefused, Reading
from studio_worker.local_studio.web.access import CONTENT_CSP

logger = logging.getLogger(__name__)

_FOREVER = {"Cache-Control": "private, max-age=31536000, immutable", "Content-Security-Policy": CONTENT_CSP}
"""Headers of stored pictures: an id never gets other bytes."""

_PIECE_BYTES = 64 << 10
"""As Starlette's own answers with files."""


async def picture(
    request: Request, pictures: Pictures, key: str, media_type: str, headers: Mapping[str, str] | None = None
) -> Response:
    """A stored picture. Raises HTTPException 404 where somebody took it away, CannotStore."""
    headers = {**_FOREVER, **(headers or {})}
    path = pictures.file(key)
    if path is not None:
        if not await run_in_threadpool(is_file, path):
            raise HTTPException(404, "the picture's file is not in the studio's folder any more")
        return FileResponse(path, media_type=media_type, headers=headers)
    # No validator is ever given out here; whoever has one is answered with the whole (RFC 9110, 13.1.5).
    asked = None if "if-range" in request.headers else request.headers.get("range")
    try:
        reading = await run_in_threadpool(pictures.open, key, asked)
    except PictureGone as error:
        raise HTTPException(404, str(error)) from None
    except RangeRefused as error:
        raise HTTPException(416, str(error)) from None
    headers |= {"Accept-Ranges": "bytes", "Content-Length": str(reading.size_bytes)}
    if reading.content_range is not None:
        headers["Content-Range"] = reading.content_range
    status = 200 if reading.content_range is None else 206
    if request.method == "HEAD":
        reading.content.close()
        return Response(None, status, headers, media_type)
    return _InPieces(_pieces(reading), status, headers, media_type)


class _InPieces(StreamingResponse):
    """Left unfinished where the storage breaks off: the server closes the connection then, and nobody takes a
    part for the whole.
    """

    async def stream_response(self, send: Send) -> None:
        """As Starlette does, but for that."""
        try:
            await super().stream_response(send)
        except CannotStore as error:
            logger.error("answer broken off", extra={"error": str(error)})


def _pieces(reading: Reading) -> Iterator[bytes]:
    with reading.content as content:
        while piece := content.read(_PIECE_BYTES):
            yield piece


def is_file(path: Path) -> bool:
    """Whether there is one, whatever was asked for."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than any file's
        return False
