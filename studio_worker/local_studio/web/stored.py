"""What this studio keeps as answers: piece by piece, whole or by Range, and never anything but bytes.

Bytes that lie elsewhere go through the studio all the same: the browser needs no way to the storage, learns
no address of it, and no cookie of the studio's can reach it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import IO, TypeVar, TypeVarTuple, Unpack

from anyio import CapacityLimiter, to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from studio_worker.local_studio.pictures import (
    CannotStore,
    PictureGone,
    Pictures,
    RangeRefused,
    Reading,
    StorageAway,
)
from studio_worker.local_studio.web.access import CONTENT_CSP

logger = logging.getLogger(__name__)

_FOREVER = {"Cache-Control": "private, max-age=31536000, immutable", "Content-Security-Policy": CONTENT_CSP}
"""Headers of stored pictures: an id never gets other bytes."""

THREADS = 16
"""What waits for the storage of pictures at once, but for deliveries; the rest waits for these. In the common
threads (40, Starlette's) a gallery whose storage hangs would take the probes and the metrics with it.
"""

_PIECE_BYTES = 64 << 10
"""As Starlette's own answers with files."""

_Given = TypeVarTuple("_Given")
_Got = TypeVar("_Got")


class Stored:
    """What keeps the pictures, as routes use it."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._threads = CapacityLimiter(THREADS)

    async def run(self, do: Callable[[Unpack[_Given]], _Got], *given: *_Given) -> _Got:
        """Do what may wait for the storage."""
        return await to_thread.run_sync(do, *given, limiter=self._threads)

    async def picture(
        self, request: Request, key: str, media_type: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        """A stored picture. Raises HTTPException 404 where somebody took it away, CannotStore."""
        headers = {**_FOREVER, **(headers or {})}
        # No validator is ever given out here; whoever has one is answered with the whole (RFC 9110, 13.1.5).
        asked = None if "if-range" in request.headers else request.headers.get("range")
        try:
            reading = await self.run(self._pictures.open, key, asked)
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
        return _InPieces(self._pieces(reading), status, headers, media_type)

    async def _pieces(self, reading: Reading) -> AsyncGenerator[bytes, None]:
        with reading.content as content:
            while piece := await self.run(_read, content):
                yield piece


class _InPieces(StreamingResponse):
    """Left unfinished where the storage breaks off: the server closes the connection then, and nobody takes a
    part for the whole.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], status: int, headers: Mapping[str, str], media_type: str
    ) -> None:
        super().__init__(pieces, status, headers, media_type)
        self._pieces = pieces

    async def stream_response(self, send: Send) -> None:
        """As Starlette does, but for that."""
        try:
            async with aclosing(self._pieces):
                await super().stream_response(send)
        except CannotStore as error:
            logger.error("answer broken off", extra={"error": str(error)})


def _read(content: IO[bytes]) -> bytes:
    try:
        return content.read(_PIECE_BYTES)
    except OSError as error:
        raise StorageAway(f"a picture cannot be read to its end ({error.strerror})") from error
