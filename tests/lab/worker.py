"""A worker with a scripted engine, and jobs for it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from studio_worker.engine import Engine, Made, Request, Router, StepProgress
from studio_worker.jobs import Cancel, ImageTask, Job, Picture
from studio_worker.models import LocalFile, ModelSource
from studio_worker.report.activity import Activity
from studio_worker.spool.delivery import Delivery
from studio_worker.spool.in_hand import JobInHand
from studio_worker.spool.outbox import Outbox
from studio_worker.spool.part import OutboxPart
from studio_worker.work.health import Health
from studio_worker.work.ports import Ports
from studio_worker.work.worker import Worker
from tests.fakes.played import Encoding, NoFiles, untouched_health


def job(job_id: str, **task: Any) -> Job:
    """A job for the scripted engine."""
    return Job(job_id, "m", ImageTask(prompt="a hidden castle", **task), ModelSource(engine="scripted"))


class Source:
    """Gives out a list of jobs, with words for where it is paused; notes what it is told."""

    def __init__(self, *jobs: Job | str) -> None:
        self._jobs: queue.SimpleQueue[Job | str | None] = queue.SimpleQueue()
        for item in (*jobs, None):
            self._jobs.put(item)
        self.failures: list[tuple[str, str, bool]] = []
        self.finished_jobs: list[str] = []

    def take(self, rest: Callable[[], None]) -> Job | None:
        while isinstance(found := self._jobs.get(), str):
            rest()
        return found

    def report_failure(self, job_id: str, error: str, *, retryable: bool) -> None:
        self.failures.append((job_id, error, retryable))

    def finished(self, job: Job) -> None:
        self.finished_jobs.append(job.job_id)

    def close(self) -> None:
        self._jobs.put(None)


class ScriptedEngine(Engine):
    """Does for each job id what the script says; makes a picture where it says nothing."""

    def __init__(self, script: Mapping[str, Callable[[Request, StepProgress, Cancel], None]]) -> None:
        self._script = script

    def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
        act = self._script.get(request.job_id)
        if act is not None:
            act(request, progress, cancel)
        return Encoding(Picture(b"picture", "png", {"seed": 1}, {"load": 0.0, "generate": 0.5}))


def make(
    tmp_path: Path,
    source: Source,
    script: Mapping[str, Callable[[Request, StepProgress, Cancel], None]] | None = None,
    *,
    make_engine: Callable[[], Engine] | None = None,
    step_timeout_s: Callable[[], float] = lambda: 60.0,
    **neighbours: Any,
) -> tuple[Worker, OutboxPart, JobInHand]:
    """A worker of one lane, with a real spool and a scripted engine."""
    engines = Router({"scripted": make_engine or (lambda: ScriptedEngine(script or {}))})
    lane = lane_ports(tmp_path, source, engines, **neighbours)
    assert isinstance(lane.results, OutboxPart)
    assert isinstance(lane.in_hand, JobInHand)
    return Worker([lane], step_timeout_s), lane.results, lane.in_hand


def lane_ports(
    folder: Path,
    source: Source,
    engines: Router,
    *,
    files: NoFiles | None = None,
    fetch: Callable[[str, threading.Event], bytes] = lambda url, cancel: b"input",
    health: Health | None = None,
) -> Ports:
    """What a lane works with, with a real spool in ``folder``."""
    return Ports(
        source=source,
        claims=source,
        files=files or NoFiles(),
        engines=engines,
        in_hand=JobInHand(folder / "spool"),
        results=OutboxPart(Outbox(folder / "outbox"), 1),
        reports=Activity().lane(1),
        health=health or untouched_health(),
        fetch=fetch,
    )


def raises(error: BaseException) -> Callable[[Request, StepProgress, Cancel], None]:
    def act(request: Request, progress: StepProgress, cancel: Cancel) -> None:
        raise error

    return act


class KeepingEngine(ScriptedEngine):
    """Notes what it is told to load; does what ``loads`` says for a model."""

    def __init__(self, loads: Mapping[str, Callable[[Callable[[], bool]], bool]] | None = None) -> None:
        super().__init__({})
        self._loads = loads or {}
        self.asked: list[str] = []

    def resident(self) -> Mapping[str, int]:
        return {}

    def used_bytes(self) -> int | None:
        return None

    def available_bytes(self) -> int | None:
        return None

    def preload(
        self, model: str, files: Iterable[LocalFile], defaults: object, go_on: Callable[[], bool]
    ) -> bool:
        self.asked.append(model)
        return self._loads.get(model, lambda go_on: True)(go_on)

    def release(self) -> None:
        self.asked.append("release")


def delivery(tmp_path: Path, prompt: str = "a castle") -> Delivery:
    """A finished picture on disk."""
    data = tmp_path / "picture"
    data.write_bytes(b"\x89PNG bytes")
    return Delivery(
        job_id="job-1", model="m", ext="png", prompt=prompt, meta={"seed": 7}, data_path=data,
        finished_at=time.time(),
    )  # fmt: skip
