"""The outbox's own clock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from studio_worker.files import write_atomic

_SAVED_EVERY_S = 600.0


class OutboxClock:
    """How long a service has looked after the outbox, over all its starts; a crash loses ten minutes."""

    def __init__(self, path: Path, clock: Callable[[], float], *, at_least_s: float) -> None:
        self._path = path
        self._clock = clock
        self._began = self._saved = clock()
        try:
            before_s = float(path.read_text())
        except (OSError, ValueError):  # the first start, or a damaged file: the pictures tell enough
            before_s = 0.0
        self._before_s = max(before_s if 0.0 <= before_s < float("inf") else 0.0, at_least_s)

    def now_s(self) -> float:
        return self._before_s + self._clock() - self._began

    def save_now_and_then(self) -> None:
        if self._clock() - self._saved < _SAVED_EVERY_S:
            return
        self._saved = self._clock()
        with contextlib.suppress(OSError):  # on a full disk the pictures live a little longer
            write_atomic(self._path, f"{self.now_s():.0f}\n".encode())
