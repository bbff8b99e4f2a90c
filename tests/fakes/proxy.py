"""What the proxies of the tests share: a port of loopback, whose connections have a loop of their own."""

from __future__ import annotations

import asyncio
import collections
import re
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Self

HEAD_BYTES = 64 * 1024
"""The longest head of a request that is read."""


class Proxy:
    """Listens on a free port of loopback; a context manager, for any thread.

    Subclasses say in :meth:`_serve` what becomes of a connection. What they need for it is there before this
    class begins to listen.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._changed = threading.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=type(self).__name__.lower(), daemon=True
        )
        self._thread.start()
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._listen(listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            await asyncio.sleep(0)  # who was let in last has a task then
            await self._hang_up()

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait_for(self, what: str, count: int, limit_s: float) -> bool:
        """Whether ``counts[what]`` reaches ``count`` within ``limit_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self.counts[what] >= count, limit_s)

    # --- for subclasses ---

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, which is closed afterwards."""
        raise NotImplementedError

    def _count(self, what: str) -> None:
        with self._changed:
            self.counts[what] += 1
            self._changed.notify_all()

    def _do(self, what: Coroutine[Any, Any, Any]) -> Any:
        """On the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    def _listen(self, listener: socket.socket) -> asyncio.Server:
        """Serve what comes here, too."""
        server = self._do(asyncio.start_server(self._connected, sock=listener, limit=HEAD_BYTES))
        assert isinstance(server, asyncio.Server)
        self._servers.append(server)
        return server

    async def _hang_up(self) -> None:
        """Break what is under way."""
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)  # the loop itself would let it be collected in the middle
        try:
            await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a crash does: with a reset, and nothing that was still to be sent."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.transport.is_closing():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def by_itself(head: bytes) -> bytes:
    """The head of a request whose connection has no other: each is looked at."""
    head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
    return head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
