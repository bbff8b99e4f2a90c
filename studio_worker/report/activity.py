"""What the service is doing and has done, written by everybody and read by ``status`` and metrics.

The service, the worker, the session and the courier report through small methods, each in the words of
whoever calls it; none of them knows who reads. Safe from any thread. It holds no prompt and no token.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

from studio_worker.report.lanes import LaneRecord, job_of, registration_of, session_of
from studio_worker.report.snapshot import (
    NAME_CHARS,
    OUTCOMES,
    DownloadFacts,
    EndedJob,
    OfferFacts,
    Outcome,
    Phase,
    ProcessFacts,
    Snapshot,
    UploadFacts,
)

log = logging.getLogger(__name__)

_KEPT_JOBS = 20
_REASON_CHARS = 300
"""Reasons may come from the studio; what is kept and shown is bounded, as names are."""


class Activity:
    """The record of one run of the service, from its making on.

    Args:
        clock: Unix seconds.
        monotonic: seconds that do not jump.
    """

    def __init__(
        self, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._observers: list[Callable[[EndedJob], None]] = []
        self._phase: Phase = "starting"
        self._status = ""
        self._hangs = ""
        self._paused = False
        self._lanes = {1: LaneRecord(1, self._ended, clock, monotonic)}
        self._last_jobs: collections.deque[EndedJob] = collections.deque(maxlen=_KEPT_JOBS)
        self._jobs = dict.fromkeys(OUTCOMES, 0)
        self._stages_s: collections.Counter[str] = collections.Counter()
        self._offers: collections.Counter[str] = collections.Counter()
        self._rejected: collections.Counter[str] = collections.Counter()
        self._uploads = UploadFacts()
        self._downloads = DownloadFacts()
        self._began_at, self._began = clock(), monotonic()
        self._ready_after_s: float | None = None

    # --- readers ---

    def on_job_end(self, observer: Callable[[EndedJob], None]) -> None:
        """Call ``observer`` for every job that ends from now on, on the thread that ended it.

        It must be quick. What it raises is logged and harms nobody else.
        """
        with self._guard:
            self._observers.append(observer)

    def lane(self, number: int) -> LaneRecord:
        """The record of one lane, from 1; made when it is asked for first."""
        with self._guard:
            if number not in self._lanes:
                self._lanes[number] = LaneRecord(number, self._ended, self._clock, self._monotonic)
            return self._lanes[number]

    @property
    def phase(self) -> Phase:
        return self._phase

    def snapshot(self) -> Snapshot:
        """What is known here; the service adds what lives elsewhere (process, outbox, device)."""
        with self._guard:
            lanes = tuple(self._lanes[number].facts() for number in sorted(self._lanes))
            return Snapshot(
                process=ProcessFacts(started_at=self._began_at, uptime_s=self._monotonic() - self._began),
                phase=self._phase,
                status=self._status,
                hangs=self._hangs,
                paused=self._paused,
                registration=registration_of(lanes),
                session=session_of(lanes),
                job=job_of(lanes),
                lanes=lanes,
                last_jobs=tuple(self._last_jobs),
                jobs={str(outcome): count for outcome, count in self._jobs.items()},
                stages_s=dict(self._stages_s),
                offers=OfferFacts(**self._offers, rejected=dict(self._rejected)),
                uploads=self._uploads,
                downloads=self._downloads,
                ready_after_s=self._ready_after_s,
            )

    # --- the service ---

    def entered(self, phase: Phase) -> None:
        with self._guard:
            self._phase = phase
            if phase == "ready":
                self._ready_after_s = self._monotonic() - self._began

    def said(self, status: str) -> None:
        """The status line is ``status`` now."""
        with self._guard:
            self._status = status

    def hangs(self, what: str) -> None:
        """What makes no progress any more; empty = nothing."""
        with self._guard:
            self._hangs = what

    def was_paused(self, paused: bool) -> None:
        with self._guard:
            self._paused = paused

    # --- the session ---

    def offer_answered(
        self, answer: Literal["accepted", "again", "impossible", "rejected"], code: str | None = None
    ) -> None:
        with self._guard:
            if answer == "rejected":
                self._rejected[code or "other"] += 1
            else:
                self._offers[answer] += 1

    # --- the courier ---

    def upload_delivered(
        self, job_id: str, model: str, stages_s: Mapping[str, float], size_bytes: int
    ) -> None:
        """The studio has the picture; ``stages_s`` holds every stage of the job, its upload too."""
        with self._guard:
            self._uploads = self._uploads.model_copy(
                update={
                    "delivered": self._uploads.delivered + 1,
                    "delivered_bytes": self._uploads.delivered_bytes + size_bytes,
                }
            )
        self._ended(job_id, model, "done", stages_s=stages_s)

    def upload_refused(self, job_id: str, model: str, stages_s: Mapping[str, float], reason: str) -> None:
        with self._guard:
            self._uploads = self._uploads.model_copy(update={"refused": self._uploads.refused + 1})
        self._ended(job_id, model, "refused", reason, stages_s=stages_s)

    def upload_unconfirmed(self, job_id: str, model: str, stages_s: Mapping[str, float], reason: str) -> None:
        """The studio probably has the picture, from a try whose answer was lost."""
        with self._guard:
            self._uploads = self._uploads.model_copy(update={"unconfirmed": self._uploads.unconfirmed + 1})
        self._ended(job_id, model, "unconfirmed", reason, stages_s=stages_s)

    def upload_waits(self) -> None:
        """A delivery did not succeed and will be tried again."""
        with self._guard:
            self._uploads = self._uploads.model_copy(update={"retries": self._uploads.retries + 1})

    # --- downloads ---

    def download_ended(self, succeeded: bool, size_bytes: int) -> None:
        """A model file's download has come to its end, with so many bytes received."""
        with self._guard:
            before = self._downloads
            self._downloads = DownloadFacts(
                done=before.done + succeeded,
                failed=before.failed + (not succeeded),
                received_bytes=before.received_bytes + size_bytes,
            )

    # --- in here ---

    def _ended(
        self,
        job_id: str,
        model: str,
        outcome: Outcome,
        reason: str | None = None,
        *,
        retryable: bool | None = None,
        stages_s: Mapping[str, float] | None = None,
    ) -> None:
        ended = EndedJob(
            job_id=job_id[:NAME_CHARS],
            model=model[:NAME_CHARS],
            outcome=outcome,
            reason=None if reason is None else reason[:_REASON_CHARS],
            retryable=retryable,
            stages_s=dict(stages_s or {}),
            ended_at=self._clock(),
        )
        with self._guard:
            self._last_jobs.appendleft(ended)
            self._jobs[outcome] += 1
            self._stages_s.update(ended.stages_s)
            observers = list(self._observers)
        for observer in observers:
            try:
                observer(ended)
            except Exception:  # metrics must not cost a picture
                log.exception("an observer of ended jobs failed", extra={"op": "activity"})
