"""What may happen to a job, whatever the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio_worker.local_studio import rules
from studio_worker.local_studio.rules import HELD, JobStatus, QueuedJob, Rejection, RuleBroken

WORKERS = ("anna", "bert")
TOO_LARGE = Rejection("too large", "box", 2.0)

STEPS: dict[str, Callable[[QueuedJob, str], QueuedJob]] = {
    "offer": lambda job, who: rules.offered(job, who, 1.0),
    "accept": lambda job, who: rules.accepted(job, who, 2.0),
    "busy": lambda job, who: rules.declined(job, who),
    "reject": lambda job, who: rules.rejected(job, who, TOO_LARGE, WORKERS),
    "fail": lambda job, who: rules.failed(job, who, "out of memory", 3.0, retryable=True),
    "fail for good": lambda job, who: rules.failed(job, who, "unknown engine", 3.0, retryable=False),
    "drop": lambda job, _: rules.released(job, "connection lost", 4.0),
    "restart": lambda job, _: rules.released(job, "restarted", 4.0, counts=False),
    "deliver": lambda job, who: rules.delivered(job, who, 5.0),
}

sequences = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(WORKERS)), max_size=40)


def new_job(**more: Any) -> QueuedJob:
    return QueuedJob(job_id="j", model="m", task={"prompt": "p"}, model_source={}, created_at=0.0, **more)


def walk(steps: list[tuple[str, str]], job: QueuedJob) -> list[tuple[str, str, QueuedJob, QueuedJob | None]]:
    """Every step with the job before and after it; ``None`` where the rules forbade it."""
    walked: list[tuple[str, str, QueuedJob, QueuedJob | None]] = []
    for name, who in steps:
        try:
            after: QueuedJob | None = STEPS[name](job, who)
        except RuleBroken:
            after = None
        walked.append((name, who, job, after))
        job = after or job
    return walked


@given(sequences)
def test_rules_complete_once_and_for_ever(steps: list[tuple[str, str]]) -> None:
    """Whatever workers do in whatever order, a job is completed at most once, and stays done."""
    for _, _, before, after in walk(steps, new_job()):
        assert after is None or after.completions == (after.status is JobStatus.DONE)
        if before.status is JobStatus.DONE:
            assert after is None or after is before


@given(sequences, st.integers(min_value=1, max_value=4))
def test_rules_never_try_more_often_than_allowed(steps: list[tuple[str, str]], max_attempts: int) -> None:
    """A job is tried as often as its attempts allow; an untried one fails only where nobody will take it."""
    for _, _, _, after in walk(steps, new_job(max_attempts=max_attempts)):
        if after is not None:
            assert 0 <= after.attempts <= max_attempts
            assert after.status is not JobStatus.QUEUED or after.attempts < max_attempts
            if after.status is JobStatus.FAILED and after.attempts == 0:
                assert after.rejections.keys() == set(WORKERS)


@given(sequences)
def test_rules_hold_a_job_for_one_worker(steps: list[tuple[str, str]]) -> None:
    """Only the worker that holds a job can change it, but for the late delivery of a dropped one."""
    for name, who, before, after in walk(steps, new_job()):
        if after is None or after is before:
            continue
        assert after.status not in HELD or after.worker_id is not None
        if name in ("accept", "busy", "reject", "fail", "fail for good"):
            assert before.is_held_by(who)
        if name == "deliver" and not before.is_held_by(who):
            assert before.dropped_by == who


@given(sequences)
def test_rules_take_a_late_delivery_from_the_last_holder_only(steps: list[tuple[str, str]]) -> None:
    """After a drop only the worker that was dropped may still deliver, until somebody else has the job."""
    holder = None
    for name, who, _, after in walk(steps, new_job()):
        if after is None:
            continue
        if name == "offer":
            holder = who
        if after.dropped_by is not None:
            assert after.dropped_by == holder or after.status in (JobStatus.QUEUED, JobStatus.FAILED)
            assert not any(
                after.may_be_delivered_by(other)
                for other in WORKERS
                if other not in (after.dropped_by, holder)
            )


def reject(job: QueuedJob, who: str, reason: str, connected: tuple[str, ...] = WORKERS) -> QueuedJob:
    return rules.rejected(rules.offered(job, who, 1.0), who, Rejection(reason, who, 2.0), connected)


def test_rules_a_job_that_nobody_can_do_fails_with_all_reasons() -> None:
    """A job fails once all connected workers have rejected it, and once more; every reason is told."""
    job = reject(reject(new_job(), "anna", "needs 40 GB"), "bert", "no such engine")
    job = reject(job, "anna", "needs 40 GB")
    assert (job.status, job.reason, job.attempts) == (JobStatus.QUEUED, None, 0)
    job = reject(job, "bert", "disk too small")
    assert job.status is JobStatus.FAILED
    assert job.reason == "no worker can do it (anna: needs 40 GB; bert: disk too small)"


def test_rules_a_job_does_not_fail_while_somebody_was_not_asked() -> None:
    """A connected worker that is paused may still do what all others have rejected."""
    job = new_job()
    for _ in range(5):
        job = reject(job, "anna", "needs 40 GB")
    assert job.status is JobStatus.QUEUED
    assert reject(job, "anna", "needs 40 GB", connected=("anna",)).status is JobStatus.FAILED


def test_rules_reasons_of_many_workers_are_short() -> None:
    """What fifty workers say alike is told once."""
    many = tuple(f"box {n:02}" for n in range(50))
    job = new_job()
    for who in many * 2:
        job = reject(job, who, "needs 40 GB", many)
    assert job.reason == "no worker can do it (box 00, box 01, box 02 and 47 more: needs 40 GB)"


def test_rules_accepting_twice_changes_nothing() -> None:
    """A repeated accept keeps the time of the first."""
    job = rules.accepted(rules.offered(new_job(), "anna", 1.0), "anna", 2.0)
    assert rules.accepted(job, "anna", 9.0) is job


@pytest.mark.parametrize("status", [JobStatus.OFFERED, JobStatus.RUNNING, JobStatus.DONE])
def test_rules_retry_only_what_stands_still(status: JobStatus) -> None:
    """A job that is being done, or is done, cannot be retried."""
    with pytest.raises(RuleBroken, match="only failed or rejected"):
        rules.retried(new_job(status=status))
