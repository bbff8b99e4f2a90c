"""One connection that asks for a session: the web server's own protocol, which takes a refusal for an answer.

uvicorn (0.54) sends the status with which an upgrade is refused, and then logs an error, as if nothing had
been sent: each worker with an old token, and each that dials while the database is away, would be a fault.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class Upgrade(WebSocketsSansIOProtocol):
    """A request for a session, and the session's frames."""

    async def send(self, message: Any) -> None:
        """Pass on what the application answers."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True
