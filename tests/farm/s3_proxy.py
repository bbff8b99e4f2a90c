"""A proxy before an S3 server that fails on order: refuses with 503, breaks connections, is away.

One request a connection, so that each is looked at. What it does is drawn from its seed, so that a run can
be told again; signatures hold, since heads go through as they are but for ``Connection``.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass

from tests.fakes.proxy import Proxy, by_itself, reset

_PIECE_BYTES = 64 << 10


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    """All of an HTTP answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def refusal(status: str, code: str) -> bytes:
    """As S3 says no."""
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>No.</Message></Error>"
    return answer(status, body.encode(), "Content-Type: application/xml")


WELCOME = answer("200 OK", b"<html></html>", "Content-Type: text/html", 'ETag: "5f-60"')
"""A web page, as a proxy or a portal has it for everybody."""

_SLOW_DOWN = refusal("503 Slow Down", "SlowDown")


@dataclass
class Faults:
    """How often a request fails, as shares of 1. Changed while the proxy runs.

    ``refused``: 503 at once. ``cut``: the connection breaks, before the server hears of it or in the middle
    of what either side sends. ``is_down``: nobody listens to anything. ``is_silent``: nobody is answered;
    ``silent_to``: nobody who asks with this method. ``instead``: what everybody is answered with.
    """

    refused: float = 0.0
    cut: float = 0.0
    cut_after_bytes: tuple[int, ...] = (0, 100, 1000, 10_000)
    is_down: bool = False
    is_silent: bool = False
    silent_to: str | None = None
    instead: bytes = b""


class S3Proxy(Proxy):
    """Forwards to ``port``; counts requests by method, those with a presigned address besides, and the faults
    that really happened.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self._to = port
        self._random = random.Random(seed)
        self.faults = Faults()
        super().__init__()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method = head.partition(b" ")[0].decode()
            self._count(method)
            if b"X-Amz-Signature=" in head.partition(b"\r\n")[0]:
                self._count("presigned")
            while self.faults.is_silent or self.faults.silent_to == method:
                await asyncio.sleep(0.02)
            if self.faults.is_down:
                self._count("down")
                reset(writer)
            elif self.faults.instead:
                writer.write(self.faults.instead)
                await writer.drain()
            elif self._random.random() < self.faults.refused:
                self._count("refused")
                await _refuse(writer)
            else:
                from_server, upstream = await asyncio.open_connection("127.0.0.1", self._to)
                await self._forward(head, reader, writer, from_server, upstream)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            reset(writer)
        finally:
            if upstream is not None:
                upstream.close()

    async def _forward(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        left_bytes: float = float("inf")
        if self._random.random() < self.faults.cut:
            left_bytes = self._random.choice(self.faults.cut_after_bytes)
        upstream.write(by_itself(head))
        sending = asyncio.create_task(_pump(reader, upstream, left_bytes))
        answering = asyncio.create_task(_pump(from_server, writer, left_bytes))
        try:
            # The server's answer ends it, not the client, which may have no more to say.
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
            is_whole = (not sending.done() or await sending) and await answering
        finally:
            for way in (sending, answering):
                way.cancel()
            await asyncio.gather(sending, answering, return_exceptions=True)
        if not is_whole:
            self._count("cut")
            reset(upstream)
            reset(writer)


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, left_bytes: float) -> bool:
    """Whether all went through until ``source`` ended."""
    while piece := await source.read(_PIECE_BYTES):
        left_bytes -= len(piece)
        if left_bytes < 0:
            return False
        target.write(piece)
        await target.drain()
    return True


async def _refuse(writer: asyncio.StreamWriter) -> None:
    writer.write(_SLOW_DOWN)
    with contextlib.suppress(OSError):
        await writer.drain()
