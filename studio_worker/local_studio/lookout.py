"""Whether a job is there for a worker, looked at before anything is locked for it.

Most of the idle ask in vain: nothing waits, or all that does is left to workers that have its model loaded.
Nobody with a job to take waits for one of those, nothing is written for them, and nobody woken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, select
from sqlalchemy.exc import SQLAlchemyError

from studio_worker.local_studio import line
from studio_worker.local_studio.job_rows import HAS_NONE
from studio_worker.local_studio.line import Lines, Ready
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.turns import Crew, Patience

CREW_S = 1.0
"""So old may be what is known of the others: who looks in vain because of that looks again soon."""

REST_S = 2.0
"""So long nobody looks after one has waited for its turn in vain: others would, too, one after the other."""

_WAITING = select(line.IS_OWN).where(line.IS_ANY, HAS_NONE)


class Lookout:
    """Looks for all workers of this process.

    Args:
        clock: this machine's, in Unix seconds.
    """

    def __init__(self, database: Database, clock: Callable[[], float], patience: Patience) -> None:
        self._database = database
        self._clock = clock
        self._patience = patience
        self._crew = Crew()
        self._crew_at = float("-inf")
        self._resting_until = float("-inf")

    @contextmanager
    def resting_after_failure(self) -> Iterator[None]:
        """Of the wait for the turn to take what was seen."""
        try:
            yield
        except SQLAlchemyError:
            self._resting_until = time.monotonic() + REST_S
            raise

    def sees_one_for(self, worker_id: str, ready: Ready) -> bool:
        """Whether it is worth a step of the queue to take one for it.

        Args:
            ready: who could take a job now, asked where it matters.
        """
        if time.monotonic() < self._resting_until:
            return False
        with self._database.reading() as connection:
            is_own = connection.execute(_WAITING, {"for_whom": worker_id}).scalar()
            if is_own is None or is_own:
                return bool(is_own)
            lines = Lines(connection, worker_id, lambda: self._recent_crew(connection, ready))
            return lines.is_worth_choosing(self._clock(), self._patience)

    def _recent_crew(self, connection: Connection, ready: Ready) -> Crew:
        now = time.monotonic()
        if now - self._crew_at >= CREW_S:
            self._crew, self._crew_at = line.crew_now(connection, ready), now
        return self._crew
