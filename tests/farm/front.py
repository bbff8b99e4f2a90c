"""One address for several studio processes, as a load balancer gives them: connection by connection."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

_PIECE_BYTES = 64 * 1024


class Front:
    """Each connection goes to the next process that takes it. Runs on a thread of its own."""

    def __init__(self) -> None:
        self._ports: list[int] = []
        self.dialled = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="front", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def base_url(self) -> str:
        """The address of what speaks HTTP."""
        return f"http://127.0.0.1:{self.port}"

    def serve(self, ports: Sequence[int]) -> None:
        """From now on connections go to processes that listen there."""
        self._ports = list(ports)

    def cut(self) -> None:
        """All connections break, and nobody listens any more."""
        self._ports = []
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        await self._hang_up()

    async def _hang_up(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.dialled += 1
        try:
            there, back = await self._dialled()
            await asyncio.gather(_carried(reader, back), _carried(there, writer))
        except OSError:  # nobody takes it
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _dialled(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises ConnectionError where none of them listens."""
        for _ in range(len(self._ports)):
            self._ports.append(self._ports.pop(0))
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", self._ports[-1])
        raise ConnectionError("nobody listens")


async def _carried(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE_BYTES):
                writer.write(piece)
                await writer.drain()
    finally:
        writer.close()
