"""One connection at the studio's port before it is encrypted: the handshake, counted and with a deadline.

The event loop's own TLS tells nobody of a connection before its handshake is over, so that strangers who
never begin one would take all descriptors.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from studio_worker.local_studio.tls import Tls
from studio_worker.local_studio.web.visit import HEAD_S, Visit, let_in
from studio_worker.network.crowd import origin_of

logger = logging.getLogger(__name__)

_CLOSE_S = 1.0
"""For the other side's part of a close; who is gone does not hold up a stop."""


class Handshake(asyncio.Protocol):
    """A connection that becomes a :class:`Visit`; ``tls`` and ``visits`` are set by :func:`secured`."""

    tls: Tls
    visits: type[Visit]
    origin = ""

    _transport: asyncio.Transport
    _task: asyncio.Task[None]
    _since = 0.0

    def __init__(self, **wishes: Any) -> None:
        self._wishes = wishes  # the web server's, for the visit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has connected."""
        assert isinstance(transport, asyncio.Transport)
        loop = asyncio.get_running_loop()
        transport.pause_reading()  # nothing is to be read that is the handshake's
        self._transport, self._since = transport, loop.time()
        address = transport.get_extra_info("peername")
        self.origin = origin_of(address[0] if address else "")
        self._task = loop.create_task(self._shake())
        let_in(self.visits.crowd, self)

    @property
    def waits_since(self) -> float | None:
        """It always does."""
        return self._since

    @property
    def is_gone(self) -> bool:
        """Whether it is closed."""
        return self._transport.is_closing()

    def drop(self) -> None:
        """Close it at once."""
        self._task.cancel()
        self._transport.abort()

    async def _shake(self) -> None:
        early = _Early()
        try:
            transport = await asyncio.get_running_loop().start_tls(
                self._transport,
                early,
                self.tls.context,
                server_side=True,
                ssl_handshake_timeout=HEAD_S,
                ssl_shutdown_timeout=_CLOSE_S,
            )
        except OSError as error:  # no TLS, no common version, no patience: ssl.SSLError and TimeoutError too
            logger.debug("no handshake", extra={"origin": self.origin, "error": str(error)})
            return
        finally:
            self.visits.crowd.leave(self)
        if transport is None or early.is_over:
            return
        visit = self.visits(**self._wishes)
        transport.set_protocol(visit)
        visit.connection_made(cast(asyncio.Transport, _ClosedOnce(transport)))
        if early.came:
            visit.data_received(bytes(early.came))


class _ClosedOnce:
    """asyncio's encrypted transport, which after a second ``close`` answers nothing any more (in 3.11)."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def close(self) -> None:
        if not self._transport.is_closing():
            self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Early(asyncio.Protocol):
    """Keeps what comes with the handshake's last piece, before the visit is there to hear it."""

    def __init__(self) -> None:
        self.came = bytearray()
        self.is_over = False

    def data_received(self, data: bytes) -> None:
        self.came += data

    def eof_received(self) -> None:
        self.is_over = True

    def connection_lost(self, _exc: Exception | None) -> None:
        self.is_over = True


def secured(visits: type[Visit], tls: Tls) -> type[Handshake]:
    """The protocol of one server whose visits are encrypted."""
    return type("Handshake", (Handshake,), {"visits": visits, "tls": tls})
