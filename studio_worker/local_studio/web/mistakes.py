"""What nobody has foreseen in an answer: one line of the log, with its traceback, and 500 for who asked."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from studio_worker.local_studio.web.access import error_response

logger = logging.getLogger(__name__)

_PATH_CHARS = 200
"""Of an address in the log; whoever asks for one decides how long it is."""


class Mistakes:
    """The application whose mistakes end here. A handler of Starlette's for ``Exception`` would tell of them,
    and then the server once more, with the same traceback. One that comes when the answer has begun is the
    server's alone: it breaks the answer off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watching(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watching)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            await mistake(Request(scope), error)(scope, receive, send)


def mistake(request: Request, error: Exception) -> Response:
    """Tell of it."""
    logger.error("request failed", extra={"path": path_of(request)}, exc_info=error)
    return error_response(500, "the studio made a mistake; its log says more")


def path_of(request: Request) -> str:
    """What was asked for, for the log."""
    return request.url.path[:_PATH_CHARS]
