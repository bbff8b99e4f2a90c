"""What may happen to a job, as pure functions from one :class:`QueuedJob` to the next.

No clock, no database, no socket: times come in as Unix seconds. A step that the protocol forbids raises
:exc:`RuleBroken`; the caller decides whether that is a close code or an HTTP status.

Whose turn it is says :mod:`turns`.

How attempts are counted: an offer counts one, a ``reject`` gives it back (the worker never tried), and so
does a restart of the studio itself (no worker is to blame). A lost connection and a retryable failure do not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypedDict

from studio_worker.errors import ProtocolError

LOST_CONNECTION = "the connection to the worker was lost"
RESTARTED = "the studio was restarted"

ASKED = 2
"""How often a worker must have rejected a job before it counts as one that cannot do it."""

_MAX_REASON_CHARS = 2000
_MAX_NAMES = 3


class RuleBroken(ProtocolError):
    """A step that the job's state does not allow; the text is fit for a person."""


class UnknownJob(RuleBroken):
    """There is no such job, or none any more."""


class JobStatus(StrEnum):
    """Where a job stands. ``offered`` and ``running`` are *held* by one worker."""

    QUEUED = "queued"
    OFFERED = "offered"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


HELD = (JobStatus.OFFERED, JobStatus.RUNNING)


class JobExtras(TypedDict, total=False):
    """What may be said of a new job besides; ``None`` is as good as nothing."""

    game_id: str | None
    asset_name: str | None
    vram_gb_estimate: float | None
    max_attempts: int | None
    priority: int | None
    submitter: str | None


@dataclass(frozen=True)
class Rejection:
    """Why a worker will not take a job, what the worker is called, how often and when it last said so."""

    reason: str
    name: str
    at: float
    times: int = 1


@dataclass(frozen=True)
class QueuedJob:
    """One job. Times are Unix seconds.

    ``worker_id`` is the worker that holds the job, made it, or failed it last. ``dropped_by`` is a worker
    that lost its connection while holding the job, until somebody else has it: its late upload counts.
    ``rejections`` has the workers that will not take the job. ``completions`` is 0 or 1, ever;
    ``refused_uploads`` counts deliveries answered with 409. ``priority``, ``submitter`` and ``passed_at`` are
    for :mod:`turns`, ``session_no`` says which session of its worker holds it, for :mod:`leases`.
    """

    job_id: str
    model: str
    task: Mapping[str, Any]
    model_source: Mapping[str, Any]
    created_at: float
    game_id: str = "local"
    asset_name: str = "picture"
    vram_gb_estimate: float = 0.0
    max_attempts: int = 3
    status: JobStatus = JobStatus.QUEUED
    attempts: int = 0
    reason: str | None = None
    worker_id: str | None = None
    dropped_by: str | None = None
    rejections: Mapping[str, Rejection] = field(default_factory=dict)
    offered_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    completions: int = 0
    refused_uploads: int = 0
    priority: int = 0
    submitter: str = ""
    passed_at: float | None = None
    session_no: int = 0

    @property
    def kind(self) -> str:
        """The task's kind: ``image``, ``llm``, ``audio_stt``, ``audio_tts`` or ``video``."""
        return str(self.task.get("kind", "image"))

    def is_held_by(self, worker_id: str) -> bool:
        """Whether this worker has the job now."""
        return self.status in HELD and self.worker_id == worker_id

    def may_be_delivered_by(self, worker_id: str) -> bool:
        """Whether a finished result from this worker is welcome.

        A dropped job may have been marked failed because its attempts were used up; no worker ever said
        that it cannot be done, so the picture that arrives after all is taken.
        """
        if self.is_held_by(worker_id):
            return True
        return self.status in (JobStatus.QUEUED, JobStatus.FAILED) and self.dropped_by == worker_id


_ORDERED = ("model", "task", "game_id", "asset_name", "priority", "submitter")
"""What an order itself says; the rest may be from the studio, which may have been told otherwise since."""


def require_same_order(there: QueuedJob, job: QueuedJob) -> None:
    """Raises RuleBroken where two jobs of one id were not ordered as one."""
    if any(getattr(there, name) != getattr(job, name) for name in _ORDERED):
        raise RuleBroken(f"jobId: another order has {job.job_id}")


def offered(job: QueuedJob, worker_id: str, now: float, session_no: int = 0) -> QueuedJob:
    """The job goes out to a worker, over its session of this number."""
    if job.status is not JobStatus.QUEUED:
        raise RuleBroken(f"job {job.job_id} is {job.status}, not queued")
    return replace(
        job,
        status=JobStatus.OFFERED,
        worker_id=worker_id,
        attempts=job.attempts + 1,
        dropped_by=job.dropped_by if job.dropped_by == worker_id else None,
        offered_at=now,
        started_at=None,
        finished_at=None,
        passed_at=None,
        session_no=session_no,
    )


def accepted(job: QueuedJob, worker_id: str, now: float) -> QueuedJob:
    """The worker took the offer; saying so twice changes nothing, nor does saying so after it delivered.

    A picture that waited in its outbox goes out at once, on another connection than the accept.
    """
    if job.status is JobStatus.DONE and job.worker_id == worker_id:
        return job
    _require_held(job, worker_id)
    if job.status is JobStatus.RUNNING:
        return job
    return replace(job, status=JobStatus.RUNNING, started_at=now)


def declined(job: QueuedJob, worker_id: str) -> QueuedJob:
    """The worker does not take the offer now: it is busy or paused."""
    _require_held(job, worker_id)
    return _given_back(job)


def rejected(
    job: QueuedJob, worker_id: str, rejection: Rejection, connected: Collection[str] = ()
) -> QueuedJob:
    """The worker will not take the job. It fails where all that are connected have said so, and again.

    Args:
        rejection: how often is counted here.
        connected: who could be asked besides.
    """
    _require_held(job, worker_id)
    before = job.rejections.get(worker_id)
    again = replace(rejection, times=1 if before is None else before.times + 1)
    rejections = {**job.rejections, worker_id: again}
    back = replace(_given_back(job), rejections=rejections)
    if all(who in rejections and rejections[who].times >= ASKED for who in {worker_id, *connected}):
        reason = _nobody_can(rejections.values())
        return replace(back, status=JobStatus.FAILED, reason=reason, finished_at=rejection.at)
    return back


def failed(job: QueuedJob, worker_id: str, error: str, now: float, *, retryable: bool) -> QueuedJob:
    """The worker could not do the job: again while attempts are left, else failed with its reason."""
    _require_held(job, worker_id)
    gave_up = replace(job, reason=error, dropped_by=None, started_at=None)
    if retryable and job.attempts < job.max_attempts:
        return replace(gave_up, status=JobStatus.QUEUED, worker_id=None)
    return replace(gave_up, status=JobStatus.FAILED, finished_at=now)


def released(job: QueuedJob, reason: str, now: float, *, counts: bool = True) -> QueuedJob:
    """The holder's connection is gone. ``counts`` is false where the studio itself went away."""
    if job.status not in HELD:
        raise RuleBroken(f"job {job.job_id} is {job.status}, nobody holds it")
    attempts = job.attempts if counts else job.attempts - 1
    let_go = replace(job, attempts=attempts, reason=reason, dropped_by=job.worker_id, started_at=None)
    if attempts < job.max_attempts:
        return replace(let_go, status=JobStatus.QUEUED, worker_id=None)
    return replace(let_go, status=JobStatus.FAILED, finished_at=now)


def delivered(job: QueuedJob, worker_id: str, now: float) -> QueuedJob:
    """The result is here. This is the only way to ``done``, and ``done`` is final."""
    if not job.may_be_delivered_by(worker_id):
        raise RuleBroken(f"job {job.job_id} is no longer this worker's")
    return replace(
        job,
        status=JobStatus.DONE,
        reason=None,
        worker_id=worker_id,
        dropped_by=None,
        finished_at=now,
        completions=job.completions + 1,
    )


def retried(job: QueuedJob) -> QueuedJob:
    """A person wants another try: all attempts again, and workers that rejected the job are asked again."""
    if job.status is JobStatus.FAILED or (job.status is JobStatus.QUEUED and job.rejections):
        return replace(
            job,
            status=JobStatus.QUEUED,
            attempts=0,
            reason=None,
            worker_id=None,
            dropped_by=None,
            rejections={},
            started_at=None,
            finished_at=None,
            passed_at=None,
        )
    raise RuleBroken(f"job {job.job_id} is {job.status}; only failed or rejected jobs can be retried")


def _require_held(job: QueuedJob, worker_id: str) -> None:
    if not job.is_held_by(worker_id):
        raise RuleBroken(f"job {job.job_id} is not held by this worker")


def _given_back(job: QueuedJob) -> QueuedJob:
    return replace(job, status=JobStatus.QUEUED, attempts=job.attempts - 1, worker_id=None, started_at=None)


def _nobody_can(rejections: Iterable[Rejection]) -> str:
    """All reasons, each once, with whose they are."""
    names: dict[str, list[str]] = {}
    for rejection in rejections:
        names.setdefault(rejection.reason, []).append(rejection.name)
    said = []
    for reason, who in names.items():
        more = f" and {len(who) - _MAX_NAMES} more" if len(who) > _MAX_NAMES else ""
        said.append(f"{', '.join(who[:_MAX_NAMES])}{more}: {reason}")
    return f"no worker can do it ({'; '.join(said)})"[:_MAX_REASON_CHARS]
