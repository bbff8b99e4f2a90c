"""Who waits for a decision on its registration, and whose place a newcomer may take. No database, no clock.

Anybody who reaches the port may ask to work here, so the places are few. What a crowd of invented requests
cannot do is keep a real worker out: real ones ask about theirs every half minute, and come from elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

FIRST_POLL_S = 10.0
"""A worker asks for the decision at once; a request that nobody has asked about by then makes room."""
SILENT_S = 150.0
"""A worker asks every 30 s; whoever has missed five of them makes room."""


@dataclass(frozen=True)
class Asker:
    """One request that waits: where it came from, when it, or a poll of it, was heard last."""

    request_id: str
    origin: str
    heard_at: float
    has_polled: bool

    def is_silent(self, now: float) -> bool:
        """Whether nobody seems to wait for the decision any more."""
        return now - self.heard_at > (SILENT_S if self.has_polled else FIRST_POLL_S)


def dispensable(waiting: Iterable[Asker], origin: str, now: float) -> str | None:
    """Which of ``waiting`` goes for a request from ``origin``; ``None`` where all of them may be real."""
    askers = list(waiting)
    counts = Counter(asker.origin for asker in askers)
    fullest = max(counts.values(), default=0)
    going = [
        (not asker.is_silent(now), asker.heard_at, asker.request_id)
        for asker in askers
        if asker.is_silent(now) or counts[asker.origin] == fullest > counts[origin] + 1
    ]
    return min(going)[2] if going else None
