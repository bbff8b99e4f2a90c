"""The record of what the service does: every report shows in the snapshot, and ends are events."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from studio_worker.appliance.news import News
from studio_worker.errors import DeviceError
from studio_worker.report.activity import Activity
from studio_worker.report.snapshot import EndedJob, Snapshot
from studio_worker.report.starts import Starts


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def activity(clock: Clock) -> Activity:
    return Activity(clock=clock, monotonic=clock)


def test_activity_follows_a_job_to_its_delivery(activity: Activity, clock: Clock) -> None:
    """The job in hand shows stage, step and rate; once delivered it is among the last ones, with stages."""
    activity.lane(1).job_began("j1", "m")
    activity.lane(1).job_prepares()
    preparing = activity.snapshot().job
    assert preparing is not None
    assert preparing.stage == "prepare"
    activity.lane(1).job_waits()
    waiting = activity.snapshot().job
    assert waiting is not None
    assert waiting.stage == "turn"
    activity.lane(1).job_loads()
    loading = activity.snapshot().job
    assert loading is not None
    assert (loading.job_id, loading.model, loading.stage, loading.steps) == ("j1", "m", "load", None)
    for step in (1, 2, 3):
        clock.now += 0.5
        activity.lane(1).job_stepped(step, 20)
    job = activity.snapshot().job
    assert job is not None
    assert (job.stage, job.step, job.steps, job.steps_per_s) == ("generate", 3, 20, 2.0)
    assert (job.began_at, job.elapsed_s) == (100.0, 1.5)
    activity.lane(1).job_made()
    assert activity.snapshot().job is None
    assert activity.snapshot().jobs["done"] == 0
    activity.upload_waits()
    activity.upload_delivered("j1", "m", {"generate": 1.5, "upload": 0.25}, 1000)
    snapshot = activity.snapshot()
    assert [(job.job_id, job.outcome) for job in snapshot.last_jobs] == [("j1", "done")]
    assert snapshot.jobs == {"done": 1, "failed": 0, "handed_back": 0, "refused": 0, "unconfirmed": 0}
    assert snapshot.stages_s == {"generate": 1.5, "upload": 0.25}
    assert (snapshot.uploads.delivered, snapshot.uploads.retries) == (1, 1)
    assert snapshot.uploads.delivered_bytes == 1000


def test_activity_counts_every_way_a_job_ends(activity: Activity) -> None:
    """Failed, handed back and refused jobs are counted apart, newest first, with their reasons."""
    activity.lane(1).job_began("j1", "m")
    activity.lane(1).job_failed("j1", "m", "out of memory", retryable=True, handed_back=False)
    activity.lane(1).job_failed("j2", "m", "the worker is stopping", retryable=True, handed_back=True)
    activity.upload_refused("j3", "m", {}, "HTTP 409")
    snapshot = activity.snapshot()
    assert snapshot.job is None
    assert snapshot.jobs == {"done": 0, "failed": 1, "handed_back": 1, "refused": 1, "unconfirmed": 0}
    assert [(job.job_id, job.reason) for job in snapshot.last_jobs] == [
        ("j3", "HTTP 409"), ("j2", "the worker is stopping"), ("j1", "out of memory"),
    ]  # fmt: skip


def test_activity_keeps_the_job_in_hand_when_another_fails(activity: Activity) -> None:
    """An offer that fails at once does not take the job in hand off the status."""
    activity.lane(1).job_began("j1", "m")
    activity.lane(1).job_failed("j2", "m", "unknown engine", retryable=False, handed_back=False)
    job = activity.snapshot().job
    assert job is not None
    assert job.job_id == "j1"


def test_activity_stays_small(activity: Activity) -> None:
    """Months of jobs with long reasons leave the last twenty, shortened."""
    for number in range(1000):
        activity.lane(1).job_failed(f"j{number}", "m" * 999, "x" * 99_999, retryable=True, handed_back=False)
    snapshot = activity.snapshot()
    assert len(snapshot.last_jobs) == 20
    assert snapshot.last_jobs[0].job_id == "j999"
    assert snapshot.jobs["failed"] == 1000
    assert len(snapshot.model_dump_json()) < 30_000


def test_activity_tells_observers_of_ends(activity: Activity, caplog: pytest.LogCaptureFixture) -> None:
    """Metrics hear of every ended job as an event; one that fails harms no other."""
    heard: list[EndedJob] = []

    def fail(ended: EndedJob) -> None:
        raise ValueError

    activity.on_job_end(fail)
    activity.on_job_end(heard.append)
    activity.upload_delivered("j1", "m", {"generate": 2.0}, 10)
    assert [(ended.job_id, ended.outcome, ended.stages_s) for ended in heard] == [
        ("j1", "done", {"generate": 2.0})
    ]
    assert "an observer of ended jobs failed" in caplog.messages


def test_activity_counts_reconnects(activity: Activity, clock: Clock) -> None:
    """The session shows since when it is what it is, and how often it had to come back."""
    assert activity.snapshot().session.state == "none"
    activity.lane(1).session("reconnecting")
    activity.lane(1).session("connected")
    clock.now = 200.0
    activity.lane(1).session("reconnecting")
    activity.lane(1).session("reconnecting")
    clock.now = 230.0
    activity.lane(1).session("connected")
    session = activity.snapshot().session
    assert (session.state, session.since_at, session.reconnects) == ("connected", 230.0, 1)


def test_lane_that_ended_has_no_session_any_more() -> None:
    """An ended lane is not said to reconnect, and the box is said to do what those do that go on."""
    news = News()
    first, second = news.lane(1), news.lane(2)
    first.connected()
    first.ended("deleted at the studio")
    second.reconnecting("connection lost")
    snapshot = news.activity.snapshot()
    assert [lane.session.state for lane in snapshot.lanes] == ["none", "reconnecting"]
    assert (snapshot.session.state, snapshot.registration.state) == ("reconnecting", "unknown")


def test_activity_counts_answers_to_offers(activity: Activity) -> None:
    """Accepted, repeated and rejected offers are counted, the rejected ones by code."""
    activity.offer_answered("accepted")
    activity.offer_answered("again")
    activity.offer_answered("rejected", "busy")
    activity.offer_answered("rejected")
    offers = activity.snapshot().offers
    assert (offers.accepted, offers.again, offers.impossible) == (1, 1, 0)
    assert offers.rejected == {"busy": 1, "other": 1}


def test_activity_is_safe_from_many_threads(activity: Activity) -> None:
    """Reports from several threads are all counted, while others read."""

    def report() -> None:
        for number in range(200):
            activity.lane(1).job_began(f"j{number}", "m")
            activity.lane(1).job_stepped(1, 2)
            activity.lane(1).job_failed(f"j{number}", "m", "r", retryable=True, handed_back=False)
            activity.snapshot()

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert activity.snapshot().jobs["failed"] == 800


def test_snapshot_of_another_version_is_readable() -> None:
    """A command understands a service that knows more, or less, than it does."""
    snapshot = Snapshot.model_validate({"version": "9", "news": 1, "outbox": {"count": 2, "colour": "red"}})
    assert (snapshot.version, snapshot.outbox.count, snapshot.job) == ("9", 2, None)


# --- starts -----------------------------------------------------------------------------------------


def test_starts_counts_processes_that_left_no_note(tmp_path: Path, clock: Clock) -> None:
    """A process that ends in order is no crash, with an error of its own neither; one that is killed is."""
    with Starts(tmp_path, clock) as first:
        assert (first.count, first.crashes, first.last_crash_at) == (1, 0, None)
    with pytest.raises(DeviceError), Starts(tmp_path, clock):
        raise DeviceError("lost")
    killed = Starts(tmp_path, clock)
    killed.__enter__()
    clock.now = 300.0
    with Starts(tmp_path, clock) as last:
        assert (last.count, last.crashes, last.last_crash_at) == (4, 1, 300.0)


def test_starts_survives_a_damaged_file(tmp_path: Path) -> None:
    """A count that cannot be read begins anew and stops nothing."""
    (tmp_path / "starts.json").write_bytes(b"\xff{")
    with Starts(tmp_path) as starts:
        assert (starts.count, starts.crashes) == (1, 0)
