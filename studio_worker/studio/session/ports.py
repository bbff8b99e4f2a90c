"""What the session needs of others: of whoever knows the box, and of whoever is told how it goes."""

from __future__ import annotations

from typing import Protocol

from studio_worker.studio.session.offers import Judgement, Situation
from studio_worker.studio.wire import Capabilities


class Box(Protocol):
    """The box that the session speaks for. Asked anew each time, since all of it changes."""

    def capabilities(self) -> Capabilities:
        """What hello and heartbeats say of it."""
        ...

    def situation(self) -> Situation:
        """What an offer is judged by at this moment. Called beside the session's loop."""
        ...

    def reconnect_attempts(self) -> int:
        """Failed connections in a row before giving up; 0 = never."""
        ...


class SessionReports(Protocol):
    """Who is told how the session goes."""

    def connected(self) -> None: ...
    def reconnecting(self, why: str) -> None: ...
    def offer_answered(self, judgement: Judgement, model: str) -> None:
        """An offer of a job for ``model`` has its answer."""
        ...
