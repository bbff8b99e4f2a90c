"""What may happen to a job, whatever the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio_worker.local_studio import rules
from studio_worker.local_studio.rules import HELD, JobStatus, QueuedJob, RuleBroken

WORKERS = ("anna", "bert")

STEPS: dict[str, Callable[[QueuedJob, str], QueuedJob]] = {
    "offer": lambda job, who: rules.offered(job, who, 1.0),
    "accept": lambda job, who: rules.accepted(job, who, 2.0),
    "busy": lambda job, who: rules.rejected(job, who, "busy", for_now=True),
    "reject": lambda job, who: rules.rejected(job, who, "too large", for_now=False),
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
            assert after is None


@given(sequences, st.integers(min_value=1, max_value=4))
def test_rules_never_try_more_often_than_allowed(steps: list[tuple[str, str]], max_attempts: int) -> None:
    """A job is never tried more often than its attempts allow, and an untried one never fails."""
    for _, _, _, after in walk(steps, new_job(max_attempts=max_attempts)):
        if after is not None:
            assert 0 <= after.attempts <= max_attempts
            assert after.status is not JobStatus.QUEUED or after.attempts < max_attempts
            assert after.status is not JobStatus.FAILED or after.attempts > 0


@given(sequences)
def test_rules_hold_a_job_for_one_worker(steps: list[tuple[str, str]]) -> None:
    """Only the worker that holds a job can change it, but for the late delivery of a dropped one."""
    for name, who, before, after in walk(steps, new_job()):
        if after is None:
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


def test_rules_rejections_do_not_come_back() -> None:
    """A worker that rejected a job for good is passed over, and gets the next one instead."""
    first = rules.rejected(rules.offered(new_job(), "anna", 1.0), "anna", "too large", for_now=False)
    second = new_job()
    assert rules.next_for("anna", [first, second]) is second
    assert rules.next_for("bert", [first, second]) is first
    assert rules.next_for("anna", [first]) is None


def test_rules_accepting_twice_changes_nothing() -> None:
    """A repeated accept keeps the time of the first."""
    job = rules.accepted(rules.offered(new_job(), "anna", 1.0), "anna", 2.0)
    assert rules.accepted(job, "anna", 9.0) is job


@pytest.mark.parametrize("status", [JobStatus.OFFERED, JobStatus.RUNNING, JobStatus.DONE])
def test_rules_retry_only_what_stands_still(status: JobStatus) -> None:
    """A job that is being done, or is done, cannot be retried."""
    with pytest.raises(RuleBroken, match="only failed or rejected"):
        rules.retried(new_job(status=status))
