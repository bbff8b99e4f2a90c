"""What a proxy in front says of its clients: believed of the proxies that were named, and of nobody else.

Proto and For are uvicorn's to read. The host is added here: absolute addresses for workers, and the check
that a change comes from the studio's own page, go by the name that the client used.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware


class Proxied:
    """The application as clients of these proxies see it.

    Args:
        proxies: addresses and networks.
    """

    def __init__(self, app: ASGIApp, proxies: Sequence[str]) -> None:
        self._proxies = [ipaddress.ip_network(proxy) for proxy in proxies]
        self._app = ProxyHeadersMiddleware(app, list(proxies))  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and self._is_proxy(scope):
            host = Headers(scope=scope).get("x-forwarded-host", "").partition(",")[0].strip()
            if host:
                MutableHeaders(scope=scope)["host"] = host
        await self._app(scope, receive, send)  # type: ignore[arg-type]

    def _is_proxy(self, scope: Scope) -> bool:
        client = scope.get("client")
        try:
            address = ipaddress.ip_address(client[0]) if client else None
        except ValueError:
            return False
        return address is not None and any(address in network for network in self._proxies)
