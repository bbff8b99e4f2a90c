"""A limit for log lines that anybody on the network can cause: a disk is full sooner than a person looks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

EVERY_S = 60.0

_LIMITS = {
    "asyncio": 20,
    "uvicorn.error": 20,
    f"{__package__}.app": 20,
    f"{__package__}.mistakes": 20,
    f"{__package__}.worker_routes": 100,
    f"{__package__}.stored": 20,
    f"{__package__}.visit": 1,
    "studio_worker.local_studio.attendance": 1,
}
"""Lines of one message within a while, by the logger whose lines strangers can cause."""


class Seldom(logging.Filter):
    """Lets through so many lines of each message within a while; the next one says how many were left out.

    To be added to the logger whose lines are meant; see :func:`limit_lines`.
    """

    def __init__(
        self, most: int, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._most = most
        self._every_s = every_s
        self._clock = clock
        self._guard = threading.Lock()
        self._begun_at = clock()
        self._counts: dict[str, int] = {}
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        with self._guard:
            now = self._clock()
            if now - self._begun_at >= self._every_s:
                if self._left_out:
                    record.lines_left_out = self._left_out
                self._begun_at, self._left_out = now, 0
                self._counts.clear()
            # The text before its arguments: constant, so that there are few of them.
            count = self._counts[str(record.msg)] = self._counts.get(str(record.msg), 0) + 1
            if count <= self._most:
                return True
            self._left_out += 1
            return False


def limit_lines() -> None:
    """From now on, and once for all studios of this process."""
    for name, most in _LIMITS.items():
        limited = logging.getLogger(name)
        if not any(isinstance(each, Seldom) for each in limited.filters):
            limited.addFilter(Seldom(most))
