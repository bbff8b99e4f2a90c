"""Why a connection ended, as one of our own errors: the one place that maps the library's."""

from __future__ import annotations

import socket

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from studio_worker.errors import ProtocolError
from studio_worker.studio.protocol import error_for_code


def explain(error: Exception) -> ProtocolError:
    """A connection's end as one of our own errors: the one place that maps the library's."""
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, ConnectionClosed):
        close = error.rcvd
        if close is None:
            return ProtocolError("the connection broke")
        return error_for_code(close.code, close.reason or f"close code {close.code}")
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        if status == 401:
            return error_for_code(4001, "HTTP 401")
        return ProtocolError(f"the studio answered HTTP {status} to the connection")
    if isinstance(error, socket.gaierror):
        return ProtocolError("the studio's name cannot be resolved")
    if isinstance(error, TimeoutError):
        return ProtocolError("the studio did not answer in time")
    if isinstance(error, InvalidHandshake):
        return ProtocolError(f"the studio's answer is no session: {type(error).__name__}")
    text = getattr(error, "strerror", None) or type(error).__name__
    return ProtocolError(f"the studio cannot be reached: {text}")
