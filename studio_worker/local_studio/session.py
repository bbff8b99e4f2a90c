"""One worker's session as the studio holds it: its socket, its commands, its last word.

What frames mean is not known here; see :mod:`sessions`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected

from studio_worker.errors import FrameError
from studio_worker.local_studio.pictures import CannotStore
from studio_worker.local_studio.presence import Inherited, Said
from studio_worker.studio import wire

logger = logging.getLogger(__name__)

DOUBT_S = 60.0
"""So long after it answers again a database server may still do what it was asked while it stood still."""

CLOSE_SILENT = 3008
"""Close code of a session without heartbeats (IANA: Timeout); the protocol names none for it."""


class EndSession(Exception):
    """This session is over. ``code`` is one of the protocol's, or ``None`` for a plain close."""

    def __init__(self, code: wire.ErrorCode | None, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class WorkerGone(Exception):
    """The worker's socket is closed."""


_Command = Literal["offer"] | EndSession
"""What the rest of the studio may ask of a session."""


@dataclass(eq=False)
class WorkerSession:
    """One connected worker. ``base_url`` is the studio's address as this worker reached it.

    ``told`` is the job that it was offered last, unless it gave that back, and ``model`` that one's.
    ``number`` counts this worker's sessions; ``inherited`` is what it had in hand in the one before, for as
    long as its heartbeats name it. ``noted`` is what the database knows of its last heartbeat. Until
    ``in_doubt_until`` it may say that the worker holds a job of which it was told nothing, or rejected.
    """

    worker_id: str
    socket: WebSocket
    base_url: str
    capabilities: wire.Capabilities | None = None
    current_job_id: str | None = None
    told: str = ""
    model: str = ""
    number: int = 0
    inherited: Inherited | None = None
    noted: Said | None = None
    in_doubt_until: float = 0.0
    deadline: float = 0.0
    commands: asyncio.Queue[_Command] = field(default_factory=asyncio.Queue)
    _reading: asyncio.Task[Mapping[str, Any]] | None = None
    _commanded: asyncio.Task[_Command] | None = None

    @contextmanager
    def doubting(self) -> Iterator[None]:
        """A step that may be written down or not where the database does not answer, and even later."""
        try:
            yield
        except CannotStore:
            self.in_doubt_until = math.inf
            raise

    def has_ended(self, job_id: str) -> None:
        """The worker has this job in hand no more, whether or not that can be written down."""
        self.current_job_id = None
        if self.told == job_id:
            self.told = ""

    @property
    def is_paused(self) -> bool:
        """Whether the worker said that it takes no jobs."""
        return self.capabilities is not None and not self.capabilities.auto_enabled

    @property
    def state(self) -> Literal["idle", "working", "paused"]:
        """What it does, as far as its last heartbeat tells."""
        if self.current_job_id is not None:
            return "working"
        return "paused" if self.is_paused else "idle"

    async def send(self, frame: wire.StudioFrame) -> None:
        """Raises WorkerGone where nobody listens."""
        try:
            await self.socket.send_text(frame.to_json())
        except (WebSocketDisconnect, WebSocketDisconnected) as error:
            raise WorkerGone from error

    async def next_event(self) -> wire.WorkerFrame | Literal["offer"]:
        """The next command or frame, whatever comes first.

        Raises:
            FrameError: a frame that cannot be read.
            EndSession: somebody ended this session.
            TimeoutError: nothing came before the deadline.
            WorkerGone: the socket was closed.
        """
        # Looked at first: frames that are no heartbeats must not keep a session alive.
        waiting_s = self.deadline - time.monotonic()
        if waiting_s <= 0:
            raise TimeoutError
        self._reading = self._reading or asyncio.ensure_future(self.socket.receive())
        self._commanded = self._commanded or asyncio.ensure_future(self.commands.get())
        done, _ = await asyncio.wait(
            {self._reading, self._commanded}, timeout=waiting_s, return_when=asyncio.FIRST_COMPLETED
        )
        if self._commanded in done:
            command, self._commanded = self._commanded.result(), None
            if isinstance(command, EndSession):
                raise command
            return command
        if self._reading in done:
            message, self._reading = self._reading.result(), None
            return _frame_in(message)
        raise TimeoutError

    async def close(self, end: EndSession) -> None:
        """Say why, then close with the code that belongs to it."""
        logger.warning(
            "session ended", extra={"worker_id": self.worker_id, "code": end.code, "reason": end.message}
        )
        try:
            if end.code is not None:
                await self.send(wire.ErrorFrame(code=end.code, message=end.message))
            code = CLOSE_SILENT if end.code is None else wire.CLOSE_CODES[end.code]
            # A close frame holds at most 123 bytes of reason (RFC 6455, 5.5).
            await self.socket.close(code, end.message.encode()[:123].decode(errors="ignore"))
        except (WorkerGone, WebSocketDisconnect, WebSocketDisconnected):
            logger.debug("worker left before the close", extra={"worker_id": self.worker_id})

    def stop_listening(self) -> None:
        """Drop what still waits for this worker."""
        for task in (self._reading, self._commanded):
            if task is not None:
                task.cancel()


def is_finite(capabilities: wire.Capabilities) -> bool:
    """Whether its numbers are numbers; JSON readers take ``1e999``, and no page could show it."""
    return math.isfinite(capabilities.vram_total_gb) and math.isfinite(capabilities.vram_threshold_gb)


def _frame_in(message: Mapping[str, Any]) -> wire.WorkerFrame:
    if message["type"] == "websocket.disconnect":
        raise WorkerGone
    text = message.get("text")
    frame = wire.read_worker_frame(message.get("bytes") or b"" if text is None else text)
    if isinstance(frame, wire.Hello | wire.Heartbeat) and not is_finite(frame.capabilities):
        raise FrameError("unreadable frame: a memory size is not a number")
    return frame
