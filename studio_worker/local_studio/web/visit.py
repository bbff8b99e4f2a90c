"""One connection at the studio's port: the web server's own protocol with deadlines and a place in the crowd.

The web server waits for ever for a request that does not come and for a reader that does not read. Here a
request's head has a deadline, its body must keep coming, and an answer must be taken.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from studio_worker.network.crowd import Crowd, Visitor, origin_of

logger = logging.getLogger(__name__)

HEAD_S = 15.0
"""For a request's head, from the connection or from the answer before; a browser's spare connection goes
sooner, after uvicorn's five seconds."""
STALL_S = 30.0
"""Without a byte of the body, or of an answer that is taken: twice a worker's own limit for each piece."""
BODY_GRACE_S = 20.0
BODY_BYTES_PER_S = 1024
"""What a body must bring on average once the grace is over: a modem of 1990 does."""
_LOOK_EVERY_S = 2.0
_NO_LINGER = struct.pack("ii", 1, 0)
"""socket(7): close with a reset, and forget what was not sent."""


class Visit(H11Protocol):
    """A connection that keeps nobody waiting for long; ``crowd`` is set by :func:`visits_of`."""

    crowd: Crowd
    origin = ""

    _phase: Any = None
    _phase_at = 0.0
    _heard_at = 0.0
    _came_bytes = 0
    _blocked_at: float | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody has connected."""
        super().connection_made(transport)
        self.origin = origin_of(self.client[0] if self.client else "")
        self._follow(0)
        self._timer = self.loop.call_later(_LOOK_EVERY_S, self._look)
        let_in(self.crowd, self)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, by whomever."""
        super().connection_lost(exc)
        self._end()

    def data_received(self, data: bytes) -> None:
        """Some of a request has come."""
        super().data_received(data)
        self._follow(len(data))

    def on_response_complete(self) -> None:
        """The answer was given; the next request may come."""
        super().on_response_complete()
        self._follow(0)

    def shutdown(self) -> None:
        """The server ends; a body that does not come holds it up no longer."""
        super().shutdown()
        if self.waits_since is not None and self.loop.time() - self._heard_at > _LOOK_EVERY_S:
            self.drop()

    def pause_writing(self) -> None:
        """The other side does not take what is sent."""
        super().pause_writing()
        self._blocked_at = self.loop.time()

    def resume_writing(self) -> None:
        """It takes it again."""
        super().resume_writing()
        self._blocked_at = None

    @property
    def waits_since(self) -> float | None:
        """Since when the other side keeps us waiting: with its request, or with taking the answer."""
        if self.transport.get_protocol() is not self:  # a session, which looks after itself
            return None
        if self._blocked_at is not None:
            return self._blocked_at
        return self._phase_at if self._phase in {h11.IDLE, h11.SEND_BODY} else None

    @property
    def is_gone(self) -> bool:
        """Whether it is closed; of a session nobody says so here."""
        return self.transport.is_closing()

    def drop(self) -> None:
        """Close it at once, whatever is under way."""
        connection = self.transport.get_extra_info("socket")
        if self._blocked_at is not None and connection is not None:
            # Or the system goes on offering what nobody takes.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def _follow(self, came_bytes: int) -> None:
        """Note where the exchange stands."""
        now = self._heard_at = self.loop.time()
        self._came_bytes += came_bytes
        if self.conn.their_state is not self._phase:
            self._phase, self._phase_at, self._came_bytes = self.conn.their_state, now, came_bytes

    def _look(self) -> None:
        if self.transport.is_closing():
            self._end()
            return
        if self._is_too_slow(self.loop.time()):
            self.drop()
            return
        self._timer = self.loop.call_later(_LOOK_EVERY_S, self._look)

    def _is_too_slow(self, now: float) -> bool:
        if self.waits_since is None:
            return False
        if self._blocked_at is not None:
            return now - self._blocked_at > STALL_S
        if self._phase is h11.IDLE:
            return now - self._phase_at > HEAD_S
        if self.flow.read_paused:  # it is us who do not read
            self._phase_at, self._heard_at, self._came_bytes = now, now, 0
        due_bytes = (now - self._phase_at - BODY_GRACE_S) * BODY_BYTES_PER_S
        return now - self._heard_at > STALL_S or self._came_bytes < due_bytes

    def _end(self) -> None:
        self.crowd.leave(self)
        if self._timer is not None:
            self._timer.cancel()


def let_in(crowd: Crowd, visitor: Visitor) -> None:
    """One more connection; that another goes for it is said by this logger alone, whose lines are limited."""
    if (dropped := crowd.enter(visitor)) is not None:
        logger.warning(
            "too many connections; the one that was waited for longest is closed",
            extra={"most": crowd.most, "origin": dropped.origin},
        )


def visits_of(most: int) -> type[Visit]:
    """The protocol of one server that holds at most ``most`` connections."""
    return type("Visit", (Visit,), {"crowd": Crowd(most)})
