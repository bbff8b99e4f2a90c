"""Who may talk to the studio over HTTP, and the headers every answer carries.

Without a token the studio listens on loopback only, and every program of this machine is trusted; web pages
are not. So the ``Host`` must be a loopback name (DNS rebinding), and a request that changes something must
not come from a foreign ``Origin``. With a token, every page and ``/api`` route wants it, as a bearer or as
the cookie that a login leaves. Workers have credentials of their own, and the addresses they fetch without
any (``/models``, ``/files``) stay open to them: file ids cannot be guessed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from studio_worker.network import urls

COOKIE = "studio_session"
COOKIE_AGE_S = 30 * 24 * 3600

PAGE_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
CONTENT_CSP = "default-src 'none'; sandbox; frame-ancestors 'none'"
"""For bytes that came from elsewhere: they may be looked at, and may do nothing."""

_OPEN_PREFIXES = ("/graphics/api/", "/models/", "/files/", "/page/", "/health/")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def error_response(status: int, error: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The shape of every refusal: ``{"error": …}``."""
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def bearer(headers: Headers) -> str:
    """The bearer token of a request, or an empty string, which no token equals."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def http_base(connection: HTTPConnection) -> str:
    """The studio's address as this client reached it, without a path."""
    scheme = {"ws": "http", "wss": "https"}.get(connection.url.scheme, connection.url.scheme)
    return f"{scheme}://{connection.url.netloc}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address, as browsers and people write it, can only be this machine."""
    return urls.is_loopback(host.lower().rstrip("."))


class Access:
    """The decisions, without a server.

    Args:
        token: what people must know; ``None`` means that whoever reaches this machine's loopback may.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token
        # Not the token itself: a cookie lies in a browser's files. It stays good over restarts.
        self.cookie = _keyed(token, "studio-worker local studio session") if token else ""

    def is_token(self, candidate: str) -> bool:
        """Compared in constant time."""
        return self._token is not None and hmac.compare_digest(candidate.encode(), self._token.encode())

    def is_admitted(self, request: Request) -> bool:
        """Whether this request may see and change what people see and change."""
        if self._token is None:
            return True
        cookie = request.cookies.get(COOKIE, "")
        return self.is_token(bearer(request.headers)) or hmac.compare_digest(
            cookie.encode(), self.cookie.encode()
        )

    def is_host_allowed(self, headers: Headers) -> bool:
        """Whether the name this client used for us can only be ours."""
        if self._token is not None:
            return True
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
        except ValueError:
            return False
        return host is not None and is_loopback(host)

    def is_origin_allowed(self, method: str, headers: Headers) -> bool:
        """Whether a change comes from our own page, or from no page at all."""
        origin = headers.get("origin")
        if origin is None or method in _SAFE_METHODS:
            return True
        try:
            return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        except ValueError:
            return False

    def admit(self, secure: bool) -> Response:
        """What a successful login is answered."""
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            COOKIE,
            self.cookie,
            max_age=COOKIE_AGE_S,
            httponly=True,
            samesite="strict",
            secure=secure,
        )
        return response


class Guard:
    """Access as a layer around the application; also adds the headers every answer carries.

    Args:
        login_page: the HTML shown to people who have not logged in.
    """

    def __init__(self, app: ASGIApp, access: Access, login_page: str) -> None:
        self._app = app
        self._access = access
        self._login_page = login_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Content-Security-Policy", PAGE_CSP)
                # Not "no-referrer": it makes browsers send "Origin: null" with our own login form.
                headers.setdefault("Referrer-Policy", "same-origin")
                headers.setdefault("Cache-Control", "no-store")
                headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
            await send(message)

        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._access.is_host_allowed(headers):
            return error_response(421, "this studio answers to loopback names only")
        if scope["type"] == "websocket":
            return None
        if not self._access.is_origin_allowed(scope["method"], headers):
            return error_response(403, "requests from other web pages are refused")
        path: str = scope["path"]
        if path == "/login" or path.startswith(_OPEN_PREFIXES):
            return None
        request = Request(scope)
        if self._access.is_admitted(request):
            return None
        if path == "/" and "token" in request.query_params:
            if self._access.is_token(request.query_params["token"]):
                return self._access.admit(request.url.scheme == "https")
            return Response(self._login_page, status_code=401, media_type="text/html")
        if path == "/":
            return Response(self._login_page, status_code=401, media_type="text/html")
        return error_response(401, "a token is required", {"WWW-Authenticate": "Bearer"})


def _keyed(key: str, message: str) -> str:
    return hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()
