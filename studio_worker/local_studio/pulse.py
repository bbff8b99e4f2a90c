"""The beat of a studio process: it says that it lives, and lets go of claims whose lease ran out.

Whoever sees a lost claim first releases it, once. But a process judges only after it has seen the database
for a lease's length without a gap: after a start, or when the database was away, nobody could renew
anything, and the workers must be given the time to come back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from studio_worker.errors import StudioWorkerError
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.leases import BEAT_S, DEAD_S, LEASE_S
from studio_worker.local_studio.presence import Presence

logger = logging.getLogger(__name__)


class Pulse:
    """Beats on a thread of its own from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        presence: Presence,
        queue: JobQueue,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._presence = presence
        self._queue = queue
        self._lease_s = lease_s
        self._every_s = min(BEAT_S, lease_s / 2)
        self._clock = clock
        self._address = ""
        self._steady_since: float | None = None
        self._beat_at = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, address: str) -> None:
        """Beat at once, then again and again.

        Args:
            address: where this process listens, for people.
        """
        self._address = address
        self.beat()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The process is stopped: its sessions are over already."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._carefully(self._presence.end_process)

    def beat(self) -> None:
        """One beat."""
        if not self._carefully(lambda: self._presence.beat(self._address)):
            self._steady_since = None
            return
        now = self._clock()
        if self._steady_since is None or now - self._beat_at > DEAD_S:
            self._steady_since = now
        self._beat_at = now
        if now - self._steady_since >= self._lease_s:
            self._carefully(self.release_lost)

    def release_lost(self) -> None:
        """Put the jobs back whose workers did not come back."""
        for job_id in self._presence.lost():
            job = self._queue.let_go(job_id, self._presence.loss)
            if job is not None:
                logger.info("claim released", extra={"job_id": job_id, "reason": job.reason})

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            self.beat()

    def _carefully(self, do: Callable[[], None]) -> bool:
        """Whether it could be done: a database that is away, or a full disk, must not end the beat."""
        try:
            do()
        except StudioWorkerError as error:
            logger.error("the pulse has missed a beat", extra={"error": str(error)})
        except Exception:  # a fault in here must not end the beat, nor go unseen
            logger.exception("the pulse has missed a beat")
        else:
            return True
        return False
