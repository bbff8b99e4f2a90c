"""Who waits for a decision on its registration, and whose place a newcomer may take. No database, no clock.

Anybody who reaches the port may ask to work here, so the places are few. What a crowd of invented requests
cannot do is keep a real worker out: real ones ask about theirs every half minute, and come from elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

FIRST_POLL_S = 10.0
"""A worker asks for the decision at once; a request that nobody has asked about by then makes room."""
SILENT_S = 150.0
"""A worker asks every 30 s; whoever has missed five of them makes room."""


@dataclass(frozen=True)
class _Asker:
    origin: str
    heard_at: float
    has_polled: bool = False

    def is_silent(self, now: float) -> bool:
        return now - self.heard_at > (SILENT_S if self.has_polled else FIRST_POLL_S)


class WaitingRoom:
    """Kept in memory: after a restart, ``begun_at``, everybody counts as just heard of."""

    def __init__(self, begun_at: float) -> None:
        self._unknown = _Asker("", begun_at, has_polled=True)
        self._askers: dict[str, _Asker] = {}

    def asked(self, request_id: str, origin: str, now: float) -> None:
        """A machine has asked to be registered, perhaps again."""
        before = self._askers.get(request_id)
        self._askers[request_id] = _Asker(origin, now, before is not None and before.has_polled)

    def polled(self, request_id: str, now: float) -> None:
        """It has asked whether it is decided."""
        asker = self._askers.get(request_id, self._unknown)
        self._askers[request_id] = replace(asker, heard_at=now, has_polled=True)

    def dispensable(self, waiting: Iterable[str], origin: str, now: float) -> str | None:
        """Which of ``waiting`` goes for a request from ``origin``; ``None`` where all of them may be real."""
        self._askers = {each: self._askers.get(each, self._unknown) for each in waiting}
        counts = Counter(asker.origin for asker in self._askers.values())
        fullest = max(counts.values(), default=0)
        going = [
            (not asker.is_silent(now), asker.heard_at, request_id)
            for request_id, asker in self._askers.items()
            if asker.is_silent(now) or counts[asker.origin] == fullest > counts[origin] + 1
        ]
        return min(going)[2] if going else None
