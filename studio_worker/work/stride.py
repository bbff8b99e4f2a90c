"""When the work at hand last got on, and whether that is too long ago. May be asked from any thread."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stride:
    """The time between two signs of progress.

    Args:
        limit_s: how long that may be; asked each time.
    """

    def __init__(self, limit_s: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._moved_at: float | None = None

    @property
    def limit_s(self) -> float:
        """How long a stride may take now."""
        return self._limit_s()

    def moved(self, done: int = 0, total: int | None = None) -> None:  # noqa: ARG002  (a progress callback)
        """It got on."""
        self._moved_at = time.monotonic()

    def took_s(self) -> float:
        """How long ago that was."""
        return time.monotonic() - (self._moved_at or 0.0)

    def end(self) -> None:
        """There is no work at hand."""
        self._moved_at = None

    def is_too_long(self) -> bool:
        """Whether the work at hand has not got on for longer than it may."""
        moved_at = self._moved_at
        return moved_at is not None and time.monotonic() - moved_at > self._limit_s()
