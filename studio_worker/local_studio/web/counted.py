"""Every answer is counted by what was asked for, outermost, so that those of our mistakes are among them."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from studio_worker.local_studio.web.scrape import PATH

_STARTS = ("http.response.start", "websocket.http.response.start")


class Counted:
    """The application, and who is told of each of its answers.

    Args:
        answered: called with the part and the status.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[str, int], None]) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] in _STARTS:
                self._answered(part_of(scope["path"]), message["status"])
            await send(message)

        await self._app(scope, receive, counting)


def part_of(path: str) -> str:
    """What an address is for; few answers, whatever is asked."""
    if path.startswith("/graphics/api/"):
        return "upload" if path.endswith("/complete") else "worker"
    if path.startswith("/api/"):
        return "api"
    if path.startswith(("/models/", "/files/")):
        return "file"
    return "probe" if path.startswith("/health/") or path == PATH else "page"
