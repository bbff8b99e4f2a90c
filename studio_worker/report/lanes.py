"""What one lane of the service is and does: registration, session, the job in hand. And what all come to.

Written by those who work for that lane, each in its own words; read by ``status`` and metrics.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from studio_worker.report.snapshot import (
    NAME_CHARS,
    JobFacts,
    LaneFacts,
    Outcome,
    RegistrationFacts,
    SessionFacts,
)


class _Ended(Protocol):
    """Who is told of a job that has ended without a picture."""

    def __call__(
        self, job_id: str, model: str, outcome: Outcome, reason: str, *, retryable: bool
    ) -> None: ...


class LaneRecord:
    """The record of one lane. Safe from any thread.

    Args:
        clock: Unix seconds.
        monotonic: seconds that do not jump.
    """

    def __init__(
        self, lane: int, ended: _Ended, clock: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self._lane = lane
        self._ended = ended
        self._clock = clock
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._registration = RegistrationFacts()
        self._session = SessionFacts()
        self._connections = 0
        self._job: JobFacts | None = None
        self._job_began = 0.0
        self._first_step: tuple[float, int] | None = None

    def facts(self) -> LaneFacts:
        """All of it at this moment."""
        with self._guard:
            job = self._job
            if job is not None:
                job = job.model_copy(update={"elapsed_s": self._monotonic() - self._job_began})
            return LaneFacts(lane=self._lane, registration=self._registration, session=self._session, job=job)

    # --- registration and session ---

    def registration(
        self,
        state: Literal["pending", "approved", "ended"],
        *,
        worker_id: str | None = None,
        detail: str | None = None,
        is_given: bool = False,
    ) -> None:
        with self._guard:
            if state == "ended":  # who it was stays known
                worker_id, is_given = self._registration.worker_id, self._registration.is_given
            self._registration = RegistrationFacts(
                state=state, worker_id=worker_id, detail=detail, is_given=is_given
            )

    def session(self, state: Literal["none", "connected", "reconnecting"]) -> None:
        """The session has come to ``state``; said again it changes nothing."""
        with self._guard:
            before = self._session
            if state != before.state:
                self._connections += state == "connected"
                self._session = SessionFacts(
                    state=state, since_at=self._clock(), reconnects=max(0, self._connections - 1)
                )

    # --- the job in hand ---

    def job_began(self, job_id: str, model: str) -> None:
        with self._guard:
            self._job = JobFacts(job_id=job_id, model=model[:NAME_CHARS], began_at=self._clock())
            self._job_began = self._monotonic()
            self._first_step = None

    def job_prepares(self) -> None:
        """Its files and input pictures are there; the engine's libraries are loaded, and they are decoded."""
        self._change_job(stage="prepare")

    def job_waits(self) -> None:
        """Its files are there; the device is another lane's, or free in a moment."""
        self._change_job(stage="turn")

    def job_loads(self) -> None:
        """The engine has it."""
        self._change_job(stage="load")

    def job_stepped(self, step: int, steps: int) -> None:
        """``step`` of ``steps`` denoising steps are done."""
        now = self._monotonic()
        if self._first_step is None or step <= self._first_step[1]:  # a second pass counts from the start
            self._first_step = (now, step)
        since, first = self._first_step
        rate = (step - first) / (now - since) if now > since else None
        self._change_job(stage="generate", step=step, steps=steps, steps_per_s=rate)

    def job_made(self) -> None:
        """Its picture is in the outbox; it ends when that is delivered."""
        with self._guard:
            self._job = None

    def job_failed(self, job_id: str, model: str, reason: str, *, retryable: bool, handed_back: bool) -> None:
        with self._guard:
            if self._job is not None and self._job.job_id == job_id:
                self._job = None
        self._ended(job_id, model, "handed_back" if handed_back else "failed", reason, retryable=retryable)

    def _change_job(self, **facts: object) -> None:
        with self._guard:
            if self._job is not None:
                self._job = self._job.model_copy(update=facts)


def registration_of(lanes: Sequence[LaneFacts]) -> RegistrationFacts:
    """That of the first lane that is approved, or else of the first that has not ended."""
    found = sorted((lane.registration for lane in lanes), key=lambda each: each.state == "ended")
    return next((each for each in found if each.state == "approved"), found[0])


def session_of(lanes: Sequence[LaneFacts]) -> SessionFacts:
    """That of the first lane that is connected, or else that wants to be; reconnects are of all."""
    found = sorted((lane.session for lane in lanes), key=lambda each: each.state == "none")
    best = next((each for each in found if each.state == "connected"), found[0])
    return best.model_copy(update={"reconnects": sum(each.reconnects for each in found)})


def job_of(lanes: Sequence[LaneFacts]) -> JobFacts | None:
    """The job at the device, or else the first in hand."""
    found = [lane.job for lane in lanes if lane.job is not None]
    at_device = (job for job in found if job.stage not in {"files", "prepare", "turn"})
    return next(at_device, found[0] if found else None)
