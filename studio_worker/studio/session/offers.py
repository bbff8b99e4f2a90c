"""Judging an offer before it is answered: take it, put it back, or say why it can never be done here.

Pure rules: what the worker knows of itself comes in as a :class:`Situation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from studio_worker.errors import NotServed
from studio_worker.jobs import ImageTask, Job
from studio_worker.models import NAME_CHARS, ModelFile, ModelSource
from studio_worker.network.urls import input_url_problem, url_problem
from studio_worker.studio.wire import Claim, RejectCode, describe
from studio_worker.work.breaker import Refusal


@dataclass(frozen=True)
class Take:
    """Accept the job and run it."""

    job: Job


@dataclass(frozen=True)
class AlreadyOurs:
    """Accept: the job is in hand, or its result waits in the outbox. Nothing is made again."""

    job_id: str


@dataclass(frozen=True)
class OnItsWay:
    """No answer yet: the job's result is being uploaded, and only the end of that tells what to say."""

    job_id: str


@dataclass(frozen=True)
class Refuse:
    """Reject: another worker, or this one later, can do it.

    ``is_routine``: a working box says so every day. What else keeps it from jobs its operator has to know.
    """

    job_id: str
    reason: str
    code: RejectCode | None = None
    is_routine: bool = False


@dataclass(frozen=True)
class Impossible:
    """Accept, then fail for good: no worker could do it."""

    job_id: str
    error: str


@dataclass(frozen=True)
class Ignore:
    """No answer is possible: the offer names no job."""

    reason: str


Judgement = Take | AlreadyOurs | OnItsWay | Refuse | Impossible | Ignore


class Need(NamedTuple):
    """What a job needs here: GB of the device's memory at least, ``None`` where that cannot be told, and the
    bytes that the models folder lacks for its files.
    """

    memory_gb: float | None
    short_bytes: int = 0


@dataclass(frozen=True)
class Situation:
    """What the worker knows of itself when an offer arrives. Memory in GB (1e9 bytes) but for
    ``threshold_gib``, which the studio's estimates are compared with; ``now`` in monotonic seconds.

    ``is_elsewhere``: another lane of this box works on the job, or delivers it. ``failed_for_good`` says why
    a job cannot be done, where that could not be reported when it was found out;
    ``state_problem`` why no further job or result has room. ``memory_gb`` is what the device has for a job,
    ``needed_gb`` the least that a job needs of it by its files, where they are here to tell. ``held_back``
    says why jobs of a model, or with such a source, are not taken after others failed. ``previewed`` is what
    a job needs by the headers of files that are not here, for which it asks the files' servers: the last to
    be asked, since it takes seconds; ``is_paused_by_now`` says what has come of ``is_paused`` meanwhile.
    """

    now: float
    current_job_id: str | None
    is_paused: bool
    threshold_gib: float
    engines: frozenset[str]
    on_demand: bool
    allow_insecure_urls: bool
    is_uploading: Callable[[str], bool]
    is_just_delivered: Callable[[str], bool]
    is_in_outbox: Callable[[str], bool]
    state_problem: Callable[[], str | None]
    is_poisoned: Callable[[str], bool]
    failed_for_good: Callable[[str], str | None]
    is_on_box: Callable[[Sequence[ModelFile]], bool]
    shortfall_bytes: Callable[[Sequence[ModelFile]], int]
    is_elsewhere: Callable[[str], bool] = lambda job_id: False  # noqa: ARG005
    memory_gb: float = float("inf")
    needed_gb: Callable[[ModelSource, ImageTask], float | None] = lambda source, task: None  # noqa: ARG005
    held_back: Callable[[str, ModelSource, ImageTask], Refusal | None] = lambda model, source, task: None  # noqa: ARG005
    previewed: Callable[[ModelSource, ImageTask], Need | None] = lambda source, task: None  # noqa: ARG005
    is_paused_by_now: Callable[[], bool] = lambda: False


def judge(claim: dict[str, Any], situation: Situation) -> Judgement:
    """What to answer to an offer of ``claim``.

    Raises:
        StudioWorkerError, OSError: what the situation asks of the disk cannot be told.
    """
    job_id = claim.get("jobId")
    if not isinstance(job_id, str) or not job_id:
        return Ignore("the offer names no job")
    if len(job_id) > NAME_CHARS:  # before anything is named or looked up by it
        return Impossible(job_id, f"the offer is malformed: jobId: has more than {NAME_CHARS} characters")
    if job_id == situation.current_job_id:
        return AlreadyOurs(job_id)
    if situation.is_elsewhere(job_id):
        return Refuse(job_id, "another lane of this worker has the job", "busy", is_routine=True)
    # In this order: a result is uploaded, then delivered, then gone from the outbox.
    if situation.is_uploading(job_id):
        return OnItsWay(job_id)
    if situation.is_just_delivered(job_id):
        return Refuse(job_id, "the job's result was delivered a moment ago", "busy", is_routine=True)
    if situation.is_in_outbox(job_id):
        return AlreadyOurs(job_id)
    if situation.is_paused:
        return _paused(job_id)
    if situation.current_job_id is not None:
        return Refuse(job_id, "the worker has a job in hand", "busy", is_routine=True)
    for required in ("task", "modelSource"):
        if claim.get(required) is None:
            return Refuse(job_id, f"the offer has no {required}")
    if situation.is_poisoned(job_id):
        # It may be this box that crashes, and not the job: another worker may try.
        return Refuse(job_id, "the worker crashed twice while it worked on this job")
    if failure := situation.failed_for_good(job_id):
        return Impossible(job_id, failure)
    if problem := situation.state_problem():
        return Refuse(job_id, problem, "busy")
    try:
        return _judge_content(Claim.model_validate(claim), situation)
    except ValidationError as error:
        return Impossible(job_id, f"the offer is malformed: {describe(error)}")


def _judge_content(claim: Claim, situation: Situation) -> Judgement:
    job_id = claim.job_id
    kind = claim.task.get("kind")
    if not isinstance(kind, str):
        return Impossible(job_id, "the offer is malformed: task.kind: must be a string")
    if kind != "image":
        return Refuse(job_id, f"this worker does not serve jobs of kind {kind[:40]!r}")
    task = ImageTask.model_validate(claim.task)
    source = ModelSource.model_validate(claim.model_source)
    if source.engine not in situation.engines:
        known = ", ".join(sorted(situation.engines))
        return Refuse(job_id, f"unknown engine {source.engine[:40]!r}; this worker has {known}")
    insecure = situation.allow_insecure_urls
    problems = [
        *(url_problem(file.url, allow_insecure=insecure) for file in source.files),
        *(input_url_problem(url, allow_insecure=insecure) for url in task.input_urls),
    ]
    if problem := next(filter(None, problems), None):
        return Impossible(job_id, f"a file's address {problem}")
    if claim.vram_gb_estimate > situation.threshold_gib:
        return Refuse(
            job_id,
            f"the job needs {claim.vram_gb_estimate:g} GiB and this worker takes up to "
            f"{situation.threshold_gib:g} GiB",
        )
    if held := situation.held_back(claim.model, source, task):
        return Refuse(job_id, held.reason, "busy" if held.is_for_now else None, is_routine=held.is_for_now)
    try:
        if refusal := _lacking(job_id, Need(situation.needed_gb(source, task)), situation):
            return refusal
        if not situation.on_demand and not situation.is_on_box(source.files):
            return Refuse(job_id, f"model {claim.model[:100]} is not on this box")
        if refusal := _lacking(job_id, Need(None, situation.shortfall_bytes(source.files)), situation):
            return refusal
        need = situation.previewed(source, task)
        if need is not None and (refusal := _lacking(job_id, need, situation)):
            return refusal
        if situation.is_paused_by_now():
            return _paused(job_id)
    except NotServed as error:
        return Refuse(job_id, str(error))
    return Take(
        Job(
            job_id=job_id,
            model=claim.model,
            task=task,
            source=source,
            taken_at=situation.now,
            vram_gb_estimate=claim.vram_gb_estimate,
        )
    )


def _lacking(job_id: str, need: Need, situation: Situation) -> Refuse | None:
    """The refusal where this box has less than ``need``."""
    if need.memory_gb is not None and need.memory_gb > situation.memory_gb:
        return Refuse(
            job_id,
            f"the job needs {need.memory_gb:.1f} GB of memory and {situation.memory_gb:.1f} GB are free here",
        )
    if need.short_bytes:
        gb = need.short_bytes / 1e9
        return Refuse(job_id, f"the models folder has {gb:.1f} GB too little room for this model")
    return None


def _paused(job_id: str) -> Refuse:
    return Refuse(job_id, "the worker takes no jobs at present", "paused", is_routine=True)
