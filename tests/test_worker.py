"""The loop: one job after the other, whatever becomes of each."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from studio_worker.activity import Activity
from studio_worker.engine import Engine, Progress, Request, Router
from studio_worker.errors import DeviceError, DownloadError, DownloadRefused, JobError, StoreError
from studio_worker.jobs import Cancel, ImageTask, Job, Picture
from studio_worker.models import LocalFile, ModelFile, ModelSource
from studio_worker.outbox import Outbox
from studio_worker.spool import JobInHand
from studio_worker.worker import Worker


def job(job_id: str, **task: Any) -> Job:
    """A job for the scripted engine."""
    return Job(job_id, "m", ImageTask(prompt="a hidden castle", **task), ModelSource(engine="scripted"))


class Source:
    """Gives out a list of jobs; notes what it is told."""

    def __init__(self, *jobs: Job) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        for item in (*jobs, None):
            self._jobs.put(item)
        self.failures: list[tuple[str, str, bool]] = []
        self.finished_jobs: list[str] = []

    def take(self) -> Job | None:
        return self._jobs.get()

    def failed(self, job: Job, error: str, *, retryable: bool) -> None:
        self.failures.append((job.job_id, error, retryable))

    def finished(self, job: Job) -> None:
        self.finished_jobs.append(job.job_id)


class NoFiles:
    """A store of models that have no files; ``error`` is raised instead where it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    @contextlib.contextmanager
    def taken(
        self,
        model: str,
        files: Iterable[ModelFile],
        *,
        progress: Callable[[int, int | None], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[tuple[LocalFile, ...]]:
        if self._error is not None:
            raise self._error
        yield ()


class ScriptedEngine:
    """Does for each job id what the script says; makes a picture where it says nothing."""

    def __init__(self, script: Mapping[str, Callable[[Request, Progress, Cancel], None]]) -> None:
        self._script = script

    def generate(self, request: Request, progress: Progress, cancel: Cancel) -> Picture:
        act = self._script.get(request.job_id)
        if act is not None:
            act(request, progress, cancel)
        return Picture(b"picture", "png", {"seed": 1}, {"load": 0.0, "generate": 0.5})


def make(
    tmp_path: Path,
    source: Source,
    script: Mapping[str, Callable[[Request, Progress, Cancel], None]] | None = None,
    *,
    files: NoFiles | None = None,
    fetch: Callable[[str, threading.Event], bytes] = lambda url, cancel: b"input",
    step_timeout_s: float = 60.0,
) -> tuple[Worker, Outbox, JobInHand]:
    """A worker with a real spool and a scripted engine."""
    in_hand, outbox = JobInHand(tmp_path / "spool"), Outbox(tmp_path / "outbox")

    def scripted() -> Engine:
        return ScriptedEngine(script or {})

    worker = Worker(
        source=source,
        files=files or NoFiles(),
        engines=Router({"scripted": scripted}),
        in_hand=in_hand,
        results=outbox,
        reports=Activity(),
        fetch=fetch,
        step_timeout_s=step_timeout_s,
    )
    return worker, outbox, in_hand


def raises(error: BaseException) -> Callable[[Request, Progress, Cancel], None]:
    def act(request: Request, progress: Progress, cancel: Cancel) -> None:
        raise error

    return act


def test_worker_puts_finished_pictures_into_the_outbox(tmp_path: Path) -> None:
    """Every finished picture is on disk with its facts, and the source is told that the job has ended."""
    source = Source(job("a"), job("b"))
    worker, outbox, _ = make(tmp_path, source)
    worker.run()
    assert [d.job_id for d in outbox.oldest()] == ["a", "b"]
    first = outbox.oldest()[0]
    assert first.data_path.read_bytes() == b"picture"
    assert (first.prompt, first.meta, first.ext) == ("a hidden castle", {"seed": 1}, "png")
    assert set(first.timings_s) == {"wait", "files", "load", "generate"}
    assert source.finished_jobs == ["a", "b"]
    assert source.failures == []


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (JobError("not possible", retryable=False), False),
        (JobError("try again", retryable=True), True),
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
        (DownloadRefused("request error", "GET x: is plain http"), False),
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
    """A lost device ends the process; the job in hand goes back to be done elsewhere."""
    source = Source(job("a"), job("b"))
    worker, _, in_hand = make(tmp_path, source, {"a": raises(DeviceError("GPU lost; reboot"))})
    with pytest.raises(DeviceError):
        worker.run()
    assert source.failures == [("a", "GPU lost; reboot", True)]
    assert source.finished_jobs == ["a"]
    assert in_hand.recover() is None


def test_worker_hands_the_job_back_when_told(tmp_path: Path) -> None:
    """A job told to stop ends at its next step as retryable, and so does any that follows."""
    source = Source(job("a"), job("b"))
    running = threading.Event()

    def endless(request: Request, progress: Progress, cancel: Cancel) -> None:
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

    def crash_now(request: Request, progress: Progress, cancel: Cancel) -> None:
        # What the next process would find if this one died here.
        found.append((tmp_path / "spool" / "job-in-hand.json").read_text())

    source = Source(job("a"))
    worker, _, in_hand = make(tmp_path, source, {"a": crash_now})
    worker.run()
    assert found[0] is not None
    assert '"a"' in found[0]
    assert in_hand.recover() is None


def test_worker_without_progress_is_stuck(tmp_path: Path) -> None:
    """A job that makes no step within the limit is noticed; a job that steps, and an idle worker, are not."""
    verdicts: dict[str, bool] = {}
    held = threading.Event()

    def hang(request: Request, progress: Progress, cancel: Cancel) -> None:
        progress(1, 2)
        verdicts["stepping"] = worker.is_stuck()
        held.wait(0.15)  # longer than the step limit below
        verdicts["hanging"] = worker.is_stuck()

    source = Source(job("a"))
    worker, _, _ = make(tmp_path, source, {"a": hang}, step_timeout_s=0.1)
    assert not worker.is_stuck()
    worker.run()
    assert verdicts == {"stepping": False, "hanging": True}
    assert not worker.is_stuck()


def test_worker_logs_a_failed_job_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A failed job is one line with its id, model, reason, and whether a retry may help."""
    source = Source(job("a"))
    worker, _, _ = make(tmp_path, source, {"a": raises(JobError("no such sampler", retryable=False))})
    with caplog.at_level(logging.INFO):
        worker.run()
    lines = [record for record in caplog.records if record.message == "job failed"]
    assert len(lines) == 1
    facts = lines[0].__dict__
    assert (facts["job_id"], facts["model"], facts["error"]) == ("a", "m", "no such sampler")
    assert facts["retryable"] is False
    assert "elapsed_ms" in facts
