"""One lane's part of the outbox: the pictures that its courier delivers, with its worker's id and token.

The outbox is one: its room and its limits are the box's. Whose a picture is, its note says; one whose lane
does not run here is nobody's, and waits to be offered to another lane, or to expire.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from studio_worker.jobs import Job, Picture
from studio_worker.spool.delivery import Delivery
from studio_worker.spool.outbox import Outbox


class OutboxPart:
    """What of ``outbox`` belongs to ``lane``. Safe from any thread."""

    def __init__(self, outbox: Outbox, lane: int) -> None:
        self._outbox = outbox
        self._lane = lane
        self._changed = threading.Event()

    def add(self, job: Job, picture: Picture, timings_s: Mapping[str, float]) -> None:
        """As :meth:`Outbox.add`, for this lane."""
        self._outbox.add(job, picture, timings_s, self._lane)

    def oldest(self) -> list[Delivery]:
        """What of this lane waits, oldest first."""
        return [delivery for delivery in self._outbox.oldest() if delivery.lane == self._lane]

    def holds(self, job_id: str) -> bool:
        """Whether a picture waits, whosever it is."""
        return self._outbox.holds(job_id)

    def remove(self, delivery: Delivery) -> None:
        """As :meth:`Outbox.remove`, unless another lane has taken it over."""
        if self._outbox.lane_of(delivery.job_id) in {None, self._lane}:
            self._outbox.remove(delivery)

    def take_over(self, job_id: str) -> None:
        """As :meth:`Outbox.take_over`, by this lane."""
        self._outbox.take_over(job_id, self._lane)

    def expire(self) -> list[tuple[Delivery, str]]:
        """As :meth:`Outbox.expire`, of what is this lane's or nobody's."""
        return self._outbox.expire(self._lane)

    def catch_up(self) -> None:
        """As :meth:`Outbox.catch_up`."""
        self._outbox.catch_up()

    def is_caught_up(self) -> bool:
        """As :meth:`Outbox.is_caught_up`."""
        return self._outbox.is_caught_up()

    def only_in_memory(self) -> list[str]:
        """As :meth:`Outbox.only_in_memory`, of this lane."""
        own = {delivery.job_id for delivery in self.oldest()}
        return [job_id for job_id in self._outbox.only_in_memory() if job_id in own]

    def wake(self) -> None:
        """Let whoever waits in :meth:`wait` look again."""
        self._changed.set()

    def wait(self, timeout_s: float | None) -> None:
        """Until something has changed since the last call, or ``timeout_s`` has passed."""
        self._changed.wait(timeout_s)
        self._changed.clear()
