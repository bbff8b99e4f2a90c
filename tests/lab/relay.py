"""A slow link to a studio on loopback: a relay with a delay each way and a rate upwards, for all connections.

What is sent upwards queues for the link as it does before a modem: one stream at a time gets all of it, two
share it. As TCP has it, no connection has more on its way than a window of bytes whose receipt the sender has
not heard of. Run as ``python -m tests.lab.relay STUDIO_PORT DELAY_S UP_BYTES_S`` it prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections import deque
from dataclasses import dataclass

_PIECE_BYTES = 8 * 1024
_WINDOW_BYTES = 256 * 1024
"""More than the links of the bench hold (5 Mbit/s for 0.3 s: 188 kB), so that one stream fills them."""
_BUFFER_BYTES = 32 * 1024
"""Of the socket that takes what is sent: little, or the sender would hear of receipts before there is one."""


@dataclass
class Link:
    """One direction of the link. ``bytes_s`` is 0 where it is as fast as loopback."""

    delay_s: float
    bytes_s: float
    free_at: float = 0.0

    def arrival(self, now: float, size: int) -> float:
        """When a piece of ``size`` that is sent now is there."""
        takes_s = size / self.bytes_s if self.bytes_s else 0.0
        self.free_at = max(self.free_at, now) + takes_s
        return self.free_at + self.delay_s


async def relay(studio_port: int, delay_s: float, up_bytes_s: float) -> None:
    """Until it is cancelled."""
    up, down = Link(delay_s, up_bytes_s), Link(delay_s, 0.0)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * delay_s)  # what TCP's greeting takes
        there, back = await asyncio.open_connection("127.0.0.1", studio_port)
        with contextlib.suppress(OSError):
            await asyncio.gather(_carried(reader, back, up), _carried(there, writer, down))

    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    server = await asyncio.start_server(connected, sock=listening, limit=_PIECE_BYTES)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _carried(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: Link) -> None:
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    sent: deque[tuple[float, int]] = deque()
    """When the sender hears of the receipt of how much."""

    async def arrive() -> None:
        while True:
            at, piece = await under_way.get()
            await asyncio.sleep(max(0.0, at - loop.time()))
            if not piece:
                writer.close()
                return
            writer.write(piece)
            await writer.drain()

    arriving = asyncio.create_task(arrive())
    try:
        while piece := await reader.read(_PIECE_BYTES):
            while sum(size for _, size in sent) + len(piece) > _WINDOW_BYTES:
                heard_at, _ = sent.popleft()
                await asyncio.sleep(max(0.0, heard_at - loop.time()))
            at = link.arrival(loop.time(), len(piece))
            if link.bytes_s:  # else it is no link but loopback, with a delay
                sent.append((at + link.delay_s, len(piece)))
            under_way.put_nowait((at, piece))
    except OSError:
        pass
    under_way.put_nowait((loop.time() + link.delay_s, b""))
    with contextlib.suppress(OSError):
        await arriving


if __name__ == "__main__":
    asyncio.run(relay(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
