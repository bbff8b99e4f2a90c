"""The loop: one job after the other, whatever becomes of each."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from studio_worker.engine import Engine, Request, StepProgress
from studio_worker.errors import (
    DeviceError,
    DownloadError,
    DownloadRefused,
    JobError,
    JobImpossible,
    StoreError,
)
from studio_worker.jobs import Cancel, Job, Picture
from studio_worker.models import RequiredModel
from studio_worker.spool.in_hand import JobInHand
from tests.fakes.played import NoFiles
from tests.lab.worker import KeepingEngine, Source, job, make, raises


def test_worker_puts_finished_pictures_into_the_outbox(tmp_path: Path) -> None:
    """Every finished picture is on disk with its facts, and the source is told that the job has ended."""
    source = Source(job("a"), job("b"))
    worker, outbox, _ = make(tmp_path, source)
    worker.run()
    assert [d.job_id for d in outbox.oldest()] == ["a", "b"]
    first = outbox.oldest()[0]
    assert first.data_path.read_bytes() == b"picture"
    assert (first.prompt, first.meta, first.ext) == ("a hidden castle", {"seed": 1}, "png")
    assert set(first.timings_s) == {"wait", "files", "prepare", "load", "generate"}
    assert source.finished_jobs == ["a", "b"]
    assert source.failures == []


def test_worker_tells_how_jobs_end_to_whoever_judges_the_box(tmp_path: Path) -> None:
    """Pictures and failures count, with the error that says whose fault it was; a slow step does, too, but
    not a job that is handed back because the worker ends.
    """
    told: list[str] = []

    class Judge:
        def made(self, job: Job) -> None:
            told.append(f"{job.job_id} made")

        def failed(self, job: Job, error: Exception) -> None:
            told.append(f"{job.job_id} {type(error).__name__}")

    def slow(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        cancel.set("step 2 of 4 took 61 s")
        cancel.check()

    def ending(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        worker.hand_back("the worker is stopping")
        cancel.check()

    script = {
        "a": raises(JobError("NaN")),
        "b": raises(JobImpossible("no such sampler")),
        "c": raises(ValueError("odd")),
        "d": slow,
        "f": ending,
    }
    source = Source(*(job(job_id) for job_id in "abcdef"))
    worker, _, _ = make(tmp_path, source, script, health=Judge())
    worker.run()
    assert told == ["a JobError", "b JobImpossible", "c ValueError", "d JobCancelled", "e made"]


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (JobImpossible("not possible"), False),
        (JobError("try again"), True),
        (RuntimeError("a hidden castle burst"), True),
        (MemoryError(), True),
    ],
)
def test_worker_survives_a_failed_job(tmp_path: Path, error: Exception, retryable: bool) -> None:
    """Whatever one job does, it is reported with its reason and the next one is made."""
    source = Source(job("bad"), job("good"))
    worker, outbox, _ = make(tmp_path, source, {"bad": raises(error)})
    worker.run()
    assert [(j, r) for j, _, r in source.failures] == [("bad", retryable)]
    assert [d.job_id for d in outbox.oldest()] == ["good"]


def test_worker_reports_a_crash_without_the_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A library's error may quote the prompt: the studio gets its kind only."""
    source = Source(job("bad"))
    worker, _, _ = make(tmp_path, source, {"bad": raises(RuntimeError("a hidden castle burst"))})
    with caplog.at_level(logging.INFO):
        worker.run()
    assert source.failures == [("bad", "internal error: RuntimeError", True)]
    crash = next(record for record in caplog.records if record.message == "job crashed")
    assert "in act" in crash.__dict__["traceback"]
    assert all("castle" not in str(record.__dict__) for record in caplog.records)


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (DownloadError("request error", "GET x: refused"), True),
        (DownloadError("streaming body", "GET x: broke"), True),
        (DownloadError("non-success status", "GET x -> 404", status=404), False),
        (DownloadError("non-success status", "GET x -> 503", status=503), True),
        (DownloadError("sha256 mismatch", "GET x: sha256 mismatch"), False),
        (DownloadRefused("request error", "GET x: is plain http", is_jobs_fault=True), False),
        (DownloadRefused("request error", "GET x: its certificate is not trusted"), True),
        (StoreError("disk full"), True),
    ],
)
def test_worker_tells_whether_a_failed_download_may_pass(
    tmp_path: Path, error: DownloadError, retryable: bool
) -> None:
    """The network may be better next time; a file that does not match its hash will not."""
    source = Source(job("a"))
    worker, _, _ = make(tmp_path, source, files=NoFiles(error))
    worker.run()
    assert source.failures == [("a", str(error), retryable)]


def test_worker_fetches_the_inputs_of_a_task(tmp_path: Path) -> None:
    """Initial picture and mask reach the engine as bytes."""
    seen: list[Request] = []
    source = Source(job("a", init_image_url="https://x/i.png", mask_url="https://x/m.png"))
    worker, _, _ = make(
        tmp_path,
        source,
        {"a": lambda request, progress, cancel: seen.append(request)},
        fetch=lambda url, cancel: url.encode(),
    )
    worker.run()
    assert seen[0].inputs.init_image == b"https://x/i.png"
    assert seen[0].inputs.mask == b"https://x/m.png"
    assert seen[0].inputs.ref_image is None


def test_worker_ends_when_the_device_is_lost(tmp_path: Path) -> None:
    """A lost device ends the process; the job in hand goes back to be done elsewhere, and at the second such
    end it is not tried here any more.
    """
    for is_poisoned in (False, True):
        source = Source(job("a"), job("b"))
        worker, _, _ = make(tmp_path, source, {"a": raises(DeviceError("GPU lost; reboot"))})
        with pytest.raises(DeviceError):
            worker.run()
        assert source.failures == [("a", "GPU lost; reboot", True)]
        assert source.finished_jobs == ["a"]
        next_start = JobInHand(tmp_path / "spool")
        assert next_start.recover() == ["a"]
        assert next_start.is_poisoned("a") == is_poisoned


def test_device_that_was_lost_before_the_job_is_no_crash_of_it(tmp_path: Path) -> None:
    """A device that is gone when the engine is made for a job was not killed by that job."""
    source = Source(job("a"))

    def gone() -> Engine:
        raise DeviceError("there is no cuda:0")

    worker, _, in_hand = make(tmp_path, source, make_engine=gone)
    with pytest.raises(DeviceError):
        worker.run()
    assert source.failures == [("a", "there is no cuda:0", True)]
    assert in_hand.recover() == []


def test_worker_hands_the_job_back_when_told(tmp_path: Path) -> None:
    """A job told to stop ends at its next step as retryable, and so does any that follows."""
    source = Source(job("a"), job("b"))
    running = threading.Event()

    def endless(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        running.set()
        while True:
            cancel.check()

    worker, outbox, _ = make(tmp_path, source, {"a": endless})
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert running.wait(10)
    worker.hand_back("the worker is stopping")
    thread.join(10)
    assert source.failures == [
        ("a", "the worker is stopping", True),
        ("b", "the worker is stopping", True),
    ]
    assert outbox.oldest() == []


def test_worker_notes_the_job_before_the_engine_touches_it(tmp_path: Path) -> None:
    """While the engine works, the job is on disk, so that a crash is noticed at the next start."""
    found: list[str | None] = []

    def crash_now(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        # What the next process would find if this one died here.
        found.append((tmp_path / "spool" / "job-in-hand.json").read_text())

    source = Source(job("a"))
    worker, _, in_hand = make(tmp_path, source, {"a": crash_now})
    worker.run()
    assert found[0] is not None
    assert '"a"' in found[0]
    assert in_hand.recover() == []


def test_worker_without_progress_is_stuck(tmp_path: Path) -> None:
    """A job that makes no step within the limit is noticed; a job that steps, and an idle worker, are not."""
    verdicts: dict[str, bool] = {}
    held = threading.Event()

    def hang(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        progress(1, 2)
        verdicts["stepping"] = worker.is_stuck()
        held.wait(0.15)  # longer than the step limit below
        verdicts["hanging"] = worker.is_stuck()

    source = Source(job("a"))
    worker, _, _ = make(tmp_path, source, {"a": hang}, step_timeout_s=lambda: 0.1)
    assert not worker.is_stuck()
    worker.run()
    assert verdicts == {"stepping": False, "hanging": True}
    assert not worker.is_stuck()


def test_worker_that_loads_a_model_from_a_slow_disk_is_not_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each component that is loaded counts as progress, and no long load is taken for a long step."""
    verdicts = []
    now_s = 0.0
    monkeypatch.setattr("studio_worker.work.stride.time", SimpleNamespace(monotonic=lambda: now_s))

    def load(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        nonlocal now_s
        for _ in range(3):
            progress(0, 2)
            now_s += 250.0
            verdicts.append(worker.is_stuck())
        progress(1, 2)
        cancel.check()

    source = Source(job("a"))
    worker, _, _ = make(tmp_path, source, {"a": load}, step_timeout_s=lambda: 300.0)
    worker.run()
    assert verdicts == [False, False, False]
    assert not source.failures


def test_worker_logs_a_failed_job_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A failed job is one line with its id, model, reason, and whether a retry may help."""
    source = Source(job("a"))
    worker, _, _ = make(tmp_path, source, {"a": raises(JobImpossible("no such sampler"))})
    with caplog.at_level(logging.INFO):
        worker.run()
    lines = [record for record in caplog.records if record.message == "job failed"]
    assert len(lines) == 1
    facts = lines[0].__dict__
    assert (facts["job_id"], facts["model"], facts["error"]) == ("a", "m", "no such sampler")
    assert facts["retryable"] is False
    assert "elapsed_ms" in facts


# --- one job's own end ---


def test_worker_stopped_in_one_job_makes_the_next(tmp_path: Path) -> None:
    """A job that is cancelled is reported as retryable and leaves the next one untouched."""
    source = Source(job("a"), job("b"))

    def endless(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        cancel.set("enough")
        cancel.check()

    worker, outbox, _ = make(tmp_path, source, {"a": endless})
    worker.run()
    assert source.failures == [("a", "enough", True)]
    assert [d.job_id for d in outbox.oldest()] == ["b"]


def test_worker_stops_a_job_after_a_step_that_took_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step beyond step_timeout_s is the job's last, with its reason; the next job is made."""
    now = 1000.0
    monkeypatch.setattr("studio_worker.work.lane.time.monotonic", lambda: now)
    source = Source(job("slow"), job("loading"), job("well"))

    def steps(*seconds: float) -> Callable[[Request, StepProgress, Cancel], None]:
        def act(request: Request, progress: StepProgress, cancel: Cancel) -> None:
            nonlocal now
            for number, each in enumerate(seconds, 1):
                now += each
                progress(number, len(seconds))
                cancel.check()

        return act

    worker, outbox, in_hand = make(
        tmp_path,
        source,
        # The first sign of progress comes after the model was loaded: that is no slow step.
        {"slow": steps(1, 1, 61, 1), "loading": steps(500, 1, 1), "well": steps(59, 59, 59)},
        step_timeout_s=lambda: 60.0,
    )
    worker.run()
    assert source.failures == [
        ("slow", "step 3 of 4 took 61 s, longer than step_timeout_s (60 s)", True),
    ]
    assert [d.job_id for d in outbox.oldest()] == ["loading", "well"]
    assert in_hand.recover() == []  # a job that was stopped is no crash


def test_job_in_hand_is_held_to_the_limit_that_holds_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step_timeout_s that a reload raises spares the job in hand, and one that it lowers ends it."""
    now, limit_s = 1000.0, 60.0
    monkeypatch.setattr("studio_worker.work.lane.time.monotonic", lambda: now)

    def act(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        nonlocal now, limit_s
        for number in (1, 2, 3):
            limit_s = {1: 60.0, 2: 100.0, 3: 80.0}[number]
            now += 90
            progress(number, 4)
            cancel.check()

    source = Source(job("a"))
    worker, _, _ = make(tmp_path, source, {"a": act}, step_timeout_s=lambda: limit_s)
    worker.run()
    assert source.failures == [("a", "step 3 of 4 took 90 s, longer than step_timeout_s (80 s)", True)]


def test_worker_in_a_step_that_never_returns_stays_stuck(tmp_path: Path) -> None:
    """Where no step ends there is nothing to stop at: the verdict stays, for the watchdog to act on."""
    entered, release = threading.Event(), threading.Event()

    def hang(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        progress(1, 2)
        entered.set()
        release.wait(20)

    source = Source(job("a"))
    worker, _, _ = make(tmp_path, source, {"a": hang}, step_timeout_s=lambda: 0.05)
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert entered.wait(10)
    release.wait(0.1)  # longer than the limit
    worker.hand_back("the worker is stopping")
    verdicts = [worker.is_stuck() for _ in range(3)]
    in_hand = (tmp_path / "spool" / "job-in-hand.json").exists()
    release.set()
    thread.join(10)
    assert verdicts == [True, True, True]
    assert in_hand  # so that the watchdog's kill counts as a crash of this job


# --- disks ---


def test_worker_says_why_a_job_cannot_be_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that cannot be noted on disk is not begun: it goes back with the reason, and so do later ones."""
    source = Source(job("a"), job("b"))
    worker, outbox, in_hand = make(tmp_path, source)

    def full(job: Job) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(in_hand, "begin", full)
    worker.run()
    reason = "the job cannot be noted: No space left on device"
    assert source.failures == [("a", reason, True), ("b", reason, True)]
    assert outbox.oldest() == []


def test_worker_says_why_a_picture_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that neither disk nor memory takes is a failure that may pass, with its reason."""
    source = Source(job("a"))
    worker, outbox, _ = make(tmp_path, source)

    def full(job: Job, picture: Picture, timings_s: Mapping[str, float]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outbox, "add", full)
    worker.run()
    assert source.failures == [("a", "the finished picture cannot be kept: No space left on device", True)]


def preloading(
    tmp_path: Path, engine: KeepingEngine, go_on: Callable[[], bool] = lambda: True, **options: Any
) -> list[str]:
    """Preload models a and b; what was said meanwhile."""
    worker, _, _ = make(tmp_path, Source(), make_engine=lambda: engine, **options)
    said: list[str] = []
    worker.preload([RequiredModel(id=name, engine="scripted") for name in "ab"], go_on, said.append)
    assert not worker.is_stuck()
    return said


def test_worker_preloads_models_in_their_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every model is loaded before its first job, and it is said which one; a model that cannot be loaded
    does not keep the next one from it.
    """

    def broken(go_on: Callable[[], bool]) -> bool:
        raise JobError("no room")

    engine = KeepingEngine({"a": broken})
    with caplog.at_level(logging.INFO):
        assert preloading(tmp_path, engine) == ["loading a", "", "loading b", ""]
    assert engine.asked == ["a", "b"]
    told = {r.message: r.__dict__ for r in caplog.records if getattr(r, "op", "") == "preload"}
    assert told["model not preloaded"]["error"] == "no room"
    assert told["model preloaded"]["model"] == "b"


def test_job_goes_before_preloading(tmp_path: Path) -> None:
    """When a job comes, or the service stops, no further model is begun."""
    waiting = [False]

    def job_comes(go_on: Callable[[], bool]) -> bool:
        waiting[0] = True
        return go_on()

    engine = KeepingEngine({"a": job_comes})
    preloading(tmp_path, engine, lambda: not waiting[0])
    assert engine.asked == ["a"]


def test_paused_worker_lets_its_models_go(tmp_path: Path) -> None:
    """At a pause every engine is told to give the device's memory back, and the next job is done as any."""
    source = Source("paused", job("a"), "paused", job("b"))
    engine = KeepingEngine()
    worker, _, _ = make(tmp_path, source, make_engine=lambda: engine)
    worker.run()
    assert engine.asked == ["release"]  # at the first pause there was no engine yet
    assert source.finished_jobs == ["a", "b"]
    assert not source.failures


@pytest.mark.parametrize(
    "error",
    [JobError("out of memory on cpu"), DeviceError("cuda:0 failed"), RuntimeError("a fault")],
)
def test_pause_that_frees_nothing_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Models that cannot leave the device at a pause, because RAM is full, say, stay; the loop goes on."""
    source = Source(job("a"), "paused", job("b"))
    engine = KeepingEngine()

    def full() -> None:
        raise error

    engine.release = full  # type: ignore[method-assign]
    worker, _, _ = make(tmp_path, source, make_engine=lambda: engine)
    worker.run()
    assert source.finished_jobs == ["a", "b"]
    assert "models stay on the device" in caplog.messages


def test_preloading_that_hangs_is_noticed(tmp_path: Path) -> None:
    """A device that hangs while a model is loaded is stuck as it is in a job."""
    verdicts: list[bool] = []
    held = threading.Event()

    def hang(go_on: Callable[[], bool]) -> bool:
        go_on()
        held.wait(0.15)  # longer than the step limit
        verdicts.append(worker.is_stuck())
        return True

    engine = KeepingEngine({"a": hang})
    worker, _, _ = make(tmp_path, Source(), make_engine=lambda: engine, step_timeout_s=lambda: 0.1)
    worker.preload([RequiredModel(id="a", engine="scripted")], lambda: True, lambda text: None)
    assert verdicts == [True]
