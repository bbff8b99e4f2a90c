"""Connections to PostgreSQL that are waited for only so long.

A server that stands still without breaking its connections (a paused machine, a disk that hangs) acknowledges
every byte, and answers none; one that is far too slow answers each statement a little late. No option of
libpq or of the server notices either: who waits for an answer must.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

import psycopg

from studio_worker.local_studio.storage.postgres_trouble import STANDS_STILL

LIMIT_S = 4.0
"""Longer than a server under load takes for a step, which has milliseconds to do; sessions take theirs on the
event loop, and their workers leave after 20 s."""

PATIENCE_S = 3600.0
"""For a migration, a studio that is carried, a look at everything: an end for what would have none."""

_Answer = TypeVar("_Answer")


class StandsStill(psycopg.OperationalError):
    """The server was waited for too long; what it made of the statement is not known."""

    sqlstate = STANDS_STILL


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed where its server does not answer ``until`` then, by the monotonic clock;
    without that each question has LIMIT_S.
    """

    until: float | None = None

    def be_quick(self, limit_s: float = LIMIT_S) -> None:
        """What is asked from now on is one step."""
        self.until = time.monotonic() + limit_s

    def be_patient(self) -> None:
        """What is asked from now on is much."""
        self.until = time.monotonic() + PATIENCE_S

    def wait(self, gen: Generator[Any, Any, _Answer], *args: Any, **options: Any) -> _Answer:
        """As the driver waits. Raises StandsStill."""
        until = time.monotonic() + LIMIT_S if self.until is None else self.until
        try:
            return super().wait(_bounded(gen, until), *args, **options)
        except StandsStill:
            self.close()
            raise


def dial(connect: Callable[[], BoundedConnection], limit_s: float | None) -> BoundedConnection:
    """A new connection. Raises StandsStill.

    The driver's own limit begins when it knows the server's address, and a nameserver that says nothing is
    waited for by the system.
    """
    made: Future[BoundedConnection] = Future()

    def run() -> None:
        try:
            made.set_result(connect())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, name="dial", daemon=True).start()
    try:
        return made.result(limit_s)
    except TimeoutError:
        made.add_done_callback(_close)
        raise StandsStill(f"no connection could be made within {limit_s} s") from None


def _close(made: Future[BoundedConnection]) -> None:
    if made.exception() is None:
        made.result().close()


def _bounded(gen: Generator[Any, Any, _Answer], until: float) -> Generator[Any, Any, _Answer]:
    """The driver's generator: it is sent what the socket is ready for, now and then nothing."""
    try:
        ready = yield next(gen)
        while True:
            if not ready and time.monotonic() > until:
                raise StandsStill("the server did not answer in time")
            ready = yield gen.send(ready)
    except StopIteration as end:
        answer: _Answer = end.value
        return answer
