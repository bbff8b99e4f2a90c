"""One address for several studio processes, as a load balancer gives them: connection by connection."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence

from tests.fakes.proxy import Proxy

_PIECE_BYTES = 64 * 1024


class Front(Proxy):
    """Each connection goes to the next process that takes it. Of every upload ``withheld_bytes``, its last,
    never arrive; it is counted when all others have.
    """

    def __init__(self) -> None:
        self._ports: list[int] = []
        self.dialled = 0
        self.withheld_bytes = 0
        super().__init__()

    def serve(self, ports: Sequence[int]) -> None:
        """From now on connections go to processes that listen there."""
        self._ports = list(ports)

    def cut(self) -> None:
        """All connections break, and nobody listens any more."""
        self._ports = []
        self._do(self._hang_up())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dialled += 1
        with contextlib.suppress(OSError):  # nobody takes it
            there, back = await self._dialled()
            await asyncio.gather(self._carried(reader, back), self._carried(there, writer))

    async def _dialled(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises ConnectionError where none of them listens."""
        for _ in range(len(self._ports)):
            self._ports.append(self._ports.pop(0))
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", self._ports[-1])
        raise ConnectionError("nobody listens")

    async def _carried(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                while piece := await reader.read(_PIECE_BYTES):
                    if self.withheld_bytes and b"/complete HTTP/1.1\r\n" in piece:
                        await self._carried_in_part(piece, reader, writer)
                        return
                    writer.write(piece)
                    await writer.drain()
        finally:
            writer.close()

    async def _carried_in_part(
        self, piece: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if b"\r\n\r\n" not in piece:
            piece += await reader.readuntil(b"\r\n\r\n")
        head, _, body = piece.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        assert length is not None
        body += await reader.readexactly(int(length[1]) - len(body))
        writer.write(head + b"\r\n\r\n" + body[: -self.withheld_bytes])
        await writer.drain()
        self._count("upload")
        await reader.read()  # until the worker has gone
