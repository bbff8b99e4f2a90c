"""The port that metrics are scraped from: one thread for all connections, few of them, and none for long.

A thread for each connection without a deadline would let whoever reaches the port take every descriptor of
the worker by saying nothing. Knows nothing of what it serves.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from email.parser import BytesHeaderParser
from http import HTTPStatus

from studio_worker.network.crowd import Crowd, origin_of

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
"""At a time; a scrape takes milliseconds."""
DEADLINE_S = 10.0
"""For everything: the request, the answer, its being taken. Prometheus waits no longer by default."""
_HEAD_BYTES = 8192
_BACKLOG = 128
_START_S = 10.0

Answer = Callable[[str], tuple[str, bytes]]
"""From the request's ``Accept`` to the media type and the content."""


class ScrapeServer:
    """Serves from its making until :meth:`close`. Raises OSError where the address cannot be used."""

    def __init__(self, host: str, port: int, answer: Answer) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self._crowd = Crowd(MAX_CONNECTIONS)
        self._answer = answer
        self._loop = asyncio.new_event_loop()
        self._closed: asyncio.Event
        begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(begun,), name="metrics-port", daemon=True)
        self._thread.start()
        begun.wait(_START_S)

    def close(self) -> None:
        """No connection is left afterwards."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    def _run(self, begun: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(begun))

    async def _serve(self, begun: threading.Event) -> None:
        self._closed = asyncio.Event()
        server = await self._loop.create_server(
            lambda: _Scrape(self._crowd, self._answer, self._loop),
            sock=self._listener,
            backlog=_BACKLOG,
        )
        begun.set()
        await self._closed.wait()
        server.close()
        self._crowd.drop_all()


class _Scrape(asyncio.Protocol):
    """One connection: one request, one answer."""

    origin = ""
    _transport: asyncio.Transport

    def __init__(self, crowd: Crowd, answer: Answer, loop: asyncio.AbstractEventLoop) -> None:
        self._crowd = crowd
        self._answer = answer
        self._loop = loop
        self._head = bytearray()
        self.waits_since: float | None = loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.origin = origin_of(str(transport.get_extra_info("peername")[0]))
        self._deadline = self._loop.call_later(DEADLINE_S, self.drop)
        self._crowd.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's)
        self._deadline.cancel()
        self._crowd.leave(self)

    def data_received(self, data: bytes) -> None:
        if self.is_gone:
            return
        self._head += data
        head, end, _ = bytes(self._head[: _HEAD_BYTES + 1]).partition(b"\r\n\r\n")
        if end:
            self._respond(head)
        elif len(self._head) > _HEAD_BYTES:
            self._send(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    @property
    def is_gone(self) -> bool:
        """Whether it is closed, or will be once its answer was taken."""
        return self._transport.is_closing()

    def drop(self) -> None:
        self._transport.abort()

    def _respond(self, head: bytes) -> None:
        request, _, fields = head.partition(b"\r\n")
        method = request.split(b" ")[0]
        if method not in {b"GET", b"HEAD"}:
            self._send(HTTPStatus.METHOD_NOT_ALLOWED)
            return
        accept = BytesHeaderParser().parsebytes(fields + b"\r\n\r\n").get("Accept", "")
        try:
            media_type, content = self._answer(str(accept))
        except Exception:
            log.exception("metrics cannot be collected", extra={"op": "metrics"})
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        self._send(HTTPStatus.OK, media_type, content, is_head=method == b"HEAD")

    def _send(
        self,
        status: HTTPStatus,
        media_type: str = "text/plain",
        content: bytes = b"",
        *,
        is_head: bool = False,
    ) -> None:
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {media_type}\r\n"
            f"Content-Length: {len(content)}\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        )
        self._transport.write(head.encode("ascii") + (b"" if is_head else content))
        self._transport.close()  # once it was taken; until the deadline
