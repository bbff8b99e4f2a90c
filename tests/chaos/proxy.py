"""A TCP proxy between worker and studio that does on order what networks and servers do by themselves.

It knows just enough of HTTP and WebSocket to tell a session from an upload and to see the frames go by.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.fakes.proxy import Proxy, by_itself, reset
from tests.fakes.servers import black_hole

_PAGE = b"<!DOCTYPE html><html><title>Welcome</title>Sign in to use this network.</html>"

UploadKind = Literal["status", "refused", "swallowed", "denied", "cut", "slow"]


@dataclass(frozen=True)
class UploadFault:
    """What happens to one upload.

    ``status``: answered with ``status``, the studio hears nothing. ``refused``: answered with 409, and the
    session is dropped, as where the studio has let go of the job. ``swallowed``: the studio has it, its
    answer is lost. ``denied``: the studio has it, the worker reads a 502. ``cut``: the connection breaks in
    the middle. ``slow``: it takes ``seconds``.
    """

    kind: UploadKind
    status: int = 503
    seconds: float = 0.0


class Session:
    """One WebSocket connection that goes through."""

    def __init__(self, worker: asyncio.StreamWriter, studio: asyncio.StreamWriter) -> None:
        self.worker = worker
        self.studio = studio
        self.is_stalled = False


class ChaosProxy(Proxy):
    """Listens on a free port of two addresses and forwards to ``port``.

    Both are addresses of ``localhost`` for a process with :meth:`names` in its environment, IPv6 first. It
    counts frames by type, uploads, and the faults that really happened.
    """

    def __init__(self, port: int) -> None:
        self._studio_port = port
        self._sessions: set[Session] = set()
        self._uploads: collections.deque[UploadFault] = collections.deque()
        self._duplicates = 0
        self._portal_until = 0.0
        self.violations: list[str] = []
        super().__init__()
        self.url = f"http://localhost:{self.port}"
        try:
            self._first = "::1"
            self._first_server = self._listen(self._first_listener())
        except OSError:  # this machine has no IPv6; what is told of it holds of any address
            self._first = "127.0.0.2"
            self._first_server = self._listen(self._first_listener())

    def names(self, folder: Path) -> dict[str, str]:
        """An environment in which ``localhost`` has both addresses; ``folder`` takes what that needs."""
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            "import socket\n"
            "real = socket.getaddrinfo\n"
            "def both(host, *rest, **named):\n"
            "    if host != 'localhost':\n"
            "        return real(host, *rest, **named)\n"
            f"    first, second = (real(name, *rest, **named) for name in ('{self._first}', '127.0.0.1'))\n"
            "    return first + second\n"
            "socket.getaddrinfo = both\n"
        )
        return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}

    # --- orders ---

    def drop(self) -> None:
        """Break the sessions, without a close frame."""
        self._loop.call_soon_threadsafe(self._drop)

    def stall(self) -> None:
        """Let nothing more through the present sessions, and keep them open: a cable pulled far away."""

        def stall() -> None:
            for session in self._sessions:
                session.is_stalled = True
                self._count("stall")

        self._loop.call_soon_threadsafe(stall)

    def open_portal(self, seconds: float) -> None:
        """For so long a network's sign-in page answers for the studio, with 200; the sessions are gone."""
        self._portal_until = time.monotonic() + seconds
        self.drop()

    @contextlib.contextmanager
    def broken_first_address(self) -> Iterator[None]:
        """The first address, IPv6, swallows what is sent to it; the sessions are gone."""
        self._do(self._close_first())
        with black_hole(self._first, self.port):
            self.drop()
            yield
        self._first_server = self._listen(self._first_listener())

    def duplicate_next_offer(self) -> None:
        """The next offer goes out twice."""
        self._duplicates += 1

    def spoil_next_upload(self, fault: UploadFault) -> None:
        self._uploads.append(fault)

    # --- one connection ---

    def _first_listener(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._first else socket.AF_INET
        return socket.create_server((self._first, self.port), family=family)

    async def _close_first(self) -> None:
        self._first_server.close()

    def _drop(self) -> None:
        for session in self._sessions:
            self._count("drop")
            for writer in (session.worker, session.studio):
                reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if time.monotonic() < self._portal_until:
                await reader.readexactly(_length(head))
                self._count("portal")
                await _answer(writer, 200, _PAGE)
                return
            from_studio, upstream = await asyncio.open_connection("127.0.0.1", self._studio_port)
            if b"/connect HTTP" in head.partition(b"\r\n")[0]:
                # Frames are to be read here, so nobody is to compress them.
                upstream.write(re.sub(rb"(?i)sec-websocket-extensions:[^\r]*\r\n", b"", head))
                await self._serve_session(reader, writer, from_studio, upstream)
            else:
                is_upload = b"/complete HTTP" in head.partition(b"\r\n")[0]
                fault = None
                if is_upload:
                    self._count("upload")
                    fault = self._uploads.popleft() if self._uploads else None
                await self._serve_request(by_itself(head), fault, reader, writer, from_studio, upstream)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            reset(writer)  # the studio is down, or one side has gone
        finally:
            if upstream is not None:
                upstream.close()

    async def _serve_request(
        self,
        head: bytes,
        fault: UploadFault | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_studio: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        body = await reader.readexactly(_length(head))
        kind = fault.kind if fault else None
        if fault is not None:
            self._count(fault.kind)
            if kind == "status":
                await _answer(writer, fault.status)
                return
            if kind == "refused":
                await _answer(writer, 409)
                self._drop()
                return
            if kind == "cut":
                upstream.write(head + body[: len(body) // 2])
                await upstream.drain()
                reset(upstream)
                reset(writer)
                return
            if kind == "slow":
                pieces = max(1, len(body) // 512)
                upstream.write(head)
                for at in range(0, len(body), 512):
                    upstream.write(body[at : at + 512])
                    await upstream.drain()
                    await asyncio.sleep(fault.seconds / pieces)
                head, body = b"", b""
        upstream.write(head + body)
        await upstream.drain()
        answer = await from_studio.read()  # the studio closes when it has said everything
        if kind == "swallowed":
            reset(writer)
        elif kind == "denied":
            await _answer(writer, 502)
        else:
            writer.write(answer)
            await writer.drain()

    async def _serve_session(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_studio: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        answer = await from_studio.readuntil(b"\r\n\r\n")
        writer.write(answer)
        session = Session(writer, upstream)
        self._sessions.add(session)
        state = {"welcomed": False}

        async def from_worker() -> None:
            async for frame, content in _frames(reader):
                kind = content.get("type")
                if kind not in {None, "hello"} and not state["welcomed"]:
                    self.violations.append(f"{kind} before welcome")
                if not session.is_stalled:
                    upstream.write(frame)
                    await upstream.drain()
                if kind is not None:
                    self._count(str(kind))

        async def to_worker() -> None:
            async for frame, content in _frames(from_studio):
                kind = content.get("type")
                if kind == "welcome":
                    state["welcomed"] = True
                if session.is_stalled:
                    continue
                writer.write(frame)
                if kind == "offer" and self._duplicates > 0:
                    self._duplicates -= 1
                    self._count("duplicate")
                    writer.write(frame)
                await writer.drain()
                if kind is not None:
                    self._count(str(kind))

        tasks = [asyncio.create_task(from_worker()), asyncio.create_task(to_worker())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._sessions.discard(session)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _frames(reader: asyncio.StreamReader) -> Any:
    """Every WebSocket frame as it came, and what it says where it is a message in JSON (RFC 6455, 5.2)."""
    while True:
        start = await reader.readexactly(2)
        raw, size = start, start[1] & 0x7F
        if size >= 126:
            more = await reader.readexactly(2 if size == 126 else 8)
            raw += more
            size = int.from_bytes(more, "big")
        mask = await reader.readexactly(4) if start[1] & 0x80 else b""
        payload = await reader.readexactly(size)
        raw += mask + payload
        content: Any = {}
        if start[0] & 0x0F == 1:
            key = (mask or bytes(4)) * (size // 4 + 1)
            plain = int.from_bytes(payload, "big") ^ int.from_bytes(key[:size], "big")
            content = json.loads(plain.to_bytes(size, "big"))
        yield raw, content


def _length(head: bytes) -> int:
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(length[1]) if length else 0


async def _answer(writer: asyncio.StreamWriter, status: int, page: bytes = b"") -> None:
    kind = "Content-Type: text/html\r\n" if page else ""
    head = f"HTTP/1.1 {status} Chaos\r\n{kind}Content-Length: {len(page)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + page)
    await writer.drain()
