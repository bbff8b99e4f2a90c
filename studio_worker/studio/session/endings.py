"""Why a connection ended, as one of our own errors: the one place that maps the library's."""

from __future__ import annotations

import socket
import ssl

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidProxy,
    InvalidProxyStatus,
    InvalidStatus,
    NegotiationError,
    ProxyError,
)

from studio_worker.errors import ProtocolError
from studio_worker.studio.http.api import hint, untrusted
from studio_worker.studio.session.protocol import error_for_code


def explain(error: Exception) -> ProtocolError:
    """A connection's end, or its failure to begin, as one of our own errors; its class says whether for good.

    The texts name no address: a proxy's may hold a password.
    """
    if isinstance(error, ProtocolError):
        return error
    if isinstance(error, ConnectionClosed):
        return _closed(error)
    if isinstance(error, InvalidStatus):
        return _refused(error.response.status_code)
    return ProtocolError(_unreachable(error))


def _closed(error: ConnectionClosed) -> ProtocolError:
    if error.rcvd is not None and (error.sent is None or error.rcvd_then_sent):
        return error_for_code(error.rcvd.code, error.rcvd.reason or f"close code {error.rcvd.code}")
    if error.sent is not None:
        # We closed: a frame that is too big (1009), no UTF-8 (1007), or no WebSocket at all (1002).
        detail = error.sent.reason or "no reason"
        return ProtocolError(f"the connection was closed with code {error.sent.code} ({detail})")
    return ProtocolError("the connection broke")


def _refused(status: int) -> ProtocolError:
    if status == 401:
        return error_for_code(4001, "HTTP 401")
    return ProtocolError(f"the studio answered HTTP {status} to the connection{hint(status)}")


def _unreachable(error: Exception) -> str:
    match error:
        case InvalidProxyStatus():
            return f"the proxy answered HTTP {error.response.status_code}; see https_proxy and no_proxy"
        case ProxyError() | InvalidProxy():
            return "the proxy gave no usable answer; see https_proxy and no_proxy"
        case socket.gaierror():
            return f"the studio's name cannot be resolved ({error.strerror}); see the network and its DNS"
        case ssl.SSLCertVerificationError():
            return untrusted(error)
        case ssl.SSLError():
            return f"no encrypted connection to the studio ({error.reason or type(error).__name__})"
        case TimeoutError():
            return "the studio did not answer in time"
        case NegotiationError():
            return "the studio does not speak this protocol"
        case InvalidHandshake():
            return f"the studio's answer is no session: {type(error).__name__}"
    return f"the studio cannot be reached: {getattr(error, 'strerror', None) or type(error).__name__}"
