"""What is known of a lane's uploads: the one under way, how long each waits, what was offered again or has
just ended.

The courier's thread makes the uploads and notes here what becomes of them; the session's thread asks here
what to answer an offer of a job whose picture is finished. It makes no upload and knows neither of them.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

from studio_worker.spool.part import OutboxPart
from studio_worker.studio.backoff import Backoff

_TOKEN_REFUSED_DELAY_S = 300.0
"""A refused token is mended by a person; the picture waits."""
_OFFER_MAY_CROSS_S = 10.0
"""How long after a delivery an offer of that job may still be one that was sent before it."""


@dataclass(frozen=True)
class Patience:
    """Seconds between tries: doubled from ``base_s`` to ``cap_s``, shortened by jitter; ``disk_s`` between
    those to write and remove what a disk does not let be written and removed.
    """

    base_s: float = 1.0
    cap_s: float = 60.0
    token_refused_s: float = _TOKEN_REFUSED_DELAY_S
    disk_s: float = 10.0


class _Wait:
    """Until when one picture, or every one, waits. ``is_asked``: the studio named the time."""

    def __init__(self, patience: Patience) -> None:
        self._backoff = Backoff(random.Random(), base_s=patience.base_s, cap_s=patience.cap_s)
        self.until = 0.0
        self.is_asked = False

    def begin(self, now: float, asked_s: float | None) -> float:
        wait_s = max(self._backoff.next_s(), asked_s or 0.0)
        self.until, self.is_asked = now + wait_s, bool(asked_s)
        return wait_s


class Uploads:
    """Where every upload stands. Safe from any thread.

    Args:
        outbox: is woken where a picture that waits is to be tried now.
    """

    def __init__(self, outbox: OutboxPart, patience: Patience = Patience()) -> None:
        self.patience = patience
        self._outbox = outbox
        self._guard = threading.Lock()
        self._everything = _Wait(patience)
        self._each: dict[str, _Wait] = {}
        self._offered_again: set[str] = set()
        self._may_be_there: set[str] = set()
        self._delivered_at: dict[str, float] = {}
        self.under_way: str | None = None
        """The job whose upload is under way."""

    # --- the session, and what offers are judged by ---

    def hurry(self) -> None:
        """The studio is there again: what waits is tried now, unless the studio itself named a time."""
        with self._guard:
            for wait in (self._everything, *self._each.values()):
                if not wait.is_asked:
                    wait.until = 0.0
        self._outbox.wake()

    def offered_again(self, job_id: str) -> None:
        """The studio offers a job whose picture waits here: it is tried now, and kept over a refusal."""
        with self._guard:
            self._everything.until = 0.0
            self._each.pop(job_id, None)
            self._offered_again.add(job_id)
        self._outbox.wake()

    def take_over(self, job_id: str) -> None:
        """As :meth:`OutboxPart.take_over`."""
        self._outbox.take_over(job_id)

    def is_under_way(self, job_id: str) -> bool:
        return self.under_way == job_id

    def has_just_delivered(self, job_id: str) -> bool:
        """Whether an offer of this job must have been sent before the studio had its picture."""
        delivered_at = self._delivered_at.get(job_id)
        return delivered_at is not None and time.monotonic() - delivered_at < _OFFER_MAY_CROSS_S

    # --- the courier ---

    def begin(self, job_id: str) -> None:
        """Its upload begins; an offer before this moment has had its wish."""
        with self._guard:
            self._offered_again.discard(job_id)
            self.under_way = job_id

    def end(self, job_id: str) -> bool:
        """Its upload has ended; returns whether the studio offered that very job meanwhile."""
        with self._guard:
            self.under_way = None
            is_offered = job_id in self._offered_again
            self._offered_again.discard(job_id)  # answered now, and marked anew if it is offered anew
        return is_offered

    def is_offered_again(self, job_id: str) -> bool:
        with self._guard:
            return job_id in self._offered_again

    def delivered(self, job_id: str) -> None:
        """The studio has taken this picture, and so would take every other."""
        with self._guard:
            self._delivered_at[job_id] = time.monotonic()
            self._everything = _Wait(self.patience)

    def answer_lost(self, job_id: str) -> None:
        """All of it was sent, and no answer came."""
        self._may_be_there.add(job_id)

    def may_be_there(self, job_id: str) -> bool:
        """Whether the studio may have this picture from a try whose answer was lost."""
        return job_id in self._may_be_there

    def put_off(self, job_id: str | None, asked_s: float | None = None) -> float:
        """Have this picture wait, or every one (``None``): longer each time, and no less than the studio
        asked for. Returns the seconds.
        """
        with self._guard:
            wait = self._everything
            if job_id is not None:
                wait = self._each.setdefault(job_id, _Wait(self.patience))
            return wait.begin(time.monotonic(), asked_s)

    def due_in_s(self, job_id: str) -> float:
        """Seconds until it may be tried; none are left where it is due."""
        with self._guard:
            wait = self._each.get(job_id)
            until = max(self._everything.until, wait.until if wait else 0.0)
        return until - time.monotonic()

    def forget_others(self, waiting: set[str]) -> set[str]:
        """Keep what concerns ``waiting``. Returns what was offered again and is gone, though it was not
        delivered: dropped after a refusal that crossed the offer.
        """
        now = time.monotonic()
        with self._guard:
            gone = self._offered_again - waiting
            self._offered_again &= waiting
            self._each = {job_id: wait for job_id, wait in self._each.items() if job_id in waiting}
            self._may_be_there &= waiting
            self._delivered_at = {
                job_id: at for job_id, at in self._delivered_at.items() if now - at < _OFFER_MAY_CROSS_S
            }
            return gone - self._delivered_at.keys()
