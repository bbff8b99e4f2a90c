"""How long is waited before the studio is tried again, for its session and for its HTTP calls."""

from __future__ import annotations

import random


class Backoff:
    """Waits between connections: 1 s, doubled each time, at most 30 s; jitter shortens to half at most."""

    def __init__(self, rng: random.Random, *, base_s: float = 1.0, cap_s: float = 30.0) -> None:
        self._rng = rng
        self._base_s = base_s
        self._cap_s = cap_s
        self.failures = 0

    def next_s(self) -> float:
        """The wait after one more failure, in seconds."""
        wait = min(self._cap_s, self._base_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return wait * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """A session reached ``welcome``."""
        self.failures = 0
