"""Connections to PostgreSQL that wait for a sign of life only so long.

A server that stands still without breaking its connections (a paused machine, a disk that hangs) acknowledges
every byte, and answers none. No option of libpq or of the server notices that: who waits for an answer must.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg

from studio_worker.local_studio.storage.postgres_trouble import STANDS_STILL

LIMIT_S = 4.0
"""Longer than a server under load takes for a step, which has milliseconds to do; sessions take theirs on the
event loop, and their workers leave after 20 s."""

_Answer = TypeVar("_Answer")


class StandsStill(psycopg.OperationalError):
    """The server has said nothing for too long; what it made of the statement is not known."""

    sqlstate = STANDS_STILL


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed where its server says nothing for ``limit_s``, whatever it was asked."""

    limit_s = LIMIT_S

    def wait(self, gen: Generator[Any, Any, _Answer], *args: Any, **options: Any) -> _Answer:
        """As the driver waits. Raises StandsStill."""
        try:
            return super().wait(_bounded(gen, self.limit_s), *args, **options)
        except StandsStill:
            self.close()
            raise


def _bounded(gen: Generator[Any, Any, _Answer], limit_s: float) -> Generator[Any, Any, _Answer]:
    """The driver's generator: it is sent what the socket is ready for, now and then nothing."""
    heard_at = time.monotonic()
    try:
        ready = yield next(gen)
        while True:
            now = time.monotonic()
            if ready:
                heard_at = now
            elif now - heard_at > limit_s:
                raise StandsStill(f"the server has said nothing for {limit_s:g} s")
            ready = yield gen.send(ready)
    except StopIteration as end:
        answer: _Answer = end.value
        return answer
