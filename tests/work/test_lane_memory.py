"""What lanes hold in RAM: one job's inputs or one finished picture each, and nothing that is kept on disk."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio_worker.engine import Engine, Made, Request, Router, StepProgress
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.router import PREPARERS
from studio_worker.engine.synthetic import SyntheticEngine
from studio_worker.jobs import Cancel, ImageTask, Job, Picture
from studio_worker.models import LocalFile, ModelSource
from studio_worker.spool.outbox import Outbox
from studio_worker.spool.part import OutboxPart
from studio_worker.work.worker import Worker
from tests.fakes.played import NoFiles
from tests.lab.engine import SAMPLE, SMALL, changed_sample, encoded, scene
from tests.lab.worker import Source, lane_ports

LANES = 3
WIDTH, HEIGHT = 4096, 2048
PICTURE_BYTES = 3 * WIDTH * HEIGHT
"""Of the largest that a model makes, as it leaves the device."""
LANE_BYTES = 6 * PICTURE_BYTES
"""As Pillow has it (4 bytes a pixel), as it is encoded, and what the encoder makes of it meanwhile."""


class Given(NoFiles):
    """A store that has these models."""

    def __init__(self, models: Mapping[str, LocalFile]) -> None:
        super().__init__()
        self._models = models

    def taken(
        self, model: str, files: object, **watching: Any
    ) -> AbstractContextManager[tuple[LocalFile, ...]]:
        return nullcontext((self._models[model],))


class Fetched(bytes):
    """An input as it was fetched, that tells when nobody holds it any more."""

    gone: Callable[[], None]

    def __del__(self) -> None:
        self.gone()


def sample_job(job_id: str, model: str = "sample", **task: Any) -> Job:
    given = {"prompt": "a red gem", "ext": "png", "seed": 3, **task}
    return Job(job_id, model, ImageTask(**given), ModelSource(engine="sd-cpp", cli_defaults=SMALL))


def test_lane_lets_go_of_what_the_next_stage_does_not_need(tmp_path: Path) -> None:
    """With as many jobs as lanes at work, no input is held as it was fetched once its job has the device, and
    no picture as it was made once it is kept: what a lane holds is one of them.
    """
    held: set[tuple[str, str]] = set()
    seen: list[tuple[str, set[str]]] = []
    real = DiffusionEngine("cpu")

    def fetch(url: str, cancel: threading.Event) -> bytes:
        job_id = url.rpartition("/")[2]
        found = Fetched(encoded(scene()))
        found.gone = lambda: held.discard((job_id, "input"))
        held.add((job_id, "input"))
        return found

    class Watching(Engine):
        def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
            job_id = request.job_id
            seen.append(("at the device", {what for owner, what in held if owner == job_id}))
            made = real.make(request, progress, cancel)
            held.add((job_id, "made"))
            weakref.finalize(made, held.discard, (job_id, "made"))
            assert sum(what == "made" for _, what in held) <= LANES
            return made

    class Keeping(OutboxPart):
        def add(self, job: Job, picture: Picture, timings_s: Mapping[str, float]) -> None:
            seen.append(("kept", {what for owner, what in held if owner == job.job_id}))
            super().add(job, picture, timings_s)

    engines = Router({"sd-cpp": Watching}, preparers=PREPARERS)
    sources = [
        Source(*(sample_job(f"{lane}{n}", init_image_url=f"https://x/{lane}{n}") for n in range(4)))
        for lane in "abc"
    ]
    outbox = Outbox(tmp_path / "outbox")
    lanes = [
        replace(
            lane_ports(tmp_path / str(number), source, engines, files=Given({"sample": SAMPLE}), fetch=fetch),
            results=Keeping(outbox, number),
        )
        for number, source in enumerate(sources, 1)
    ]
    Worker(lanes, lambda: 60.0).run()
    assert [source.failures for source in sources] == [[], [], []]
    assert [found for found in seen if found[1]] == []
    assert len(seen) == 2 * 4 * LANES
    assert held == set()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def most_bytes(folder: Path, lanes: int) -> int:
    """What the process has at most when a turn begins, with so many lanes that make three pictures each."""
    found: list[int] = []
    engine = SyntheticEngine()

    class Measured(Engine):
        def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
            found.append(resident_bytes())
            return engine.make(request, progress, cancel)

    task = ImageTask(prompt="a castle", width=WIDTH, height=HEIGHT, steps=1, ext="webp")
    sources = [
        Source(*(Job(f"{lane} {n}", "m", task, ModelSource(engine="synthetic")) for n in range(3)))
        for lane in range(lanes)
    ]
    engines, outbox = Router({"synthetic": Measured}), Outbox(folder / "outbox")
    ports = [
        replace(lane_ports(folder / str(number), each, engines), results=OutboxPart(outbox, number))
        for number, each in enumerate(sources, 1)
    ]
    Worker(ports, lambda: 60.0).run()
    assert outbox.usage().count == 3 * lanes
    return max(found)


def test_pictures_that_nobody_takes_wait_on_disk_alone(tmp_path: Path) -> None:
    """However many of the largest pictures wait for a studio that takes none, each further lane has no more
    in RAM than one of them while it is encoded; and where nothing is made, the system has all of it back.
    """
    of_one = most_bytes(tmp_path / "one", 1)
    before = resident_bytes()
    assert most_bytes(tmp_path / "three", LANES) - of_one <= (LANES - 1) * LANE_BYTES
    assert resident_bytes() - before <= PICTURE_BYTES


def test_models_that_do_not_fit_together_take_turns(tmp_path: Path) -> None:
    """Two lanes with jobs of two models, of which the device has room for one: each job is made, none is
    refused or runs out of memory, and never are both models there.
    """
    other = changed_sample(tmp_path / "other.safetensors", lambda tensors: None)
    budget_bytes = 3 * SAMPLE.path.stat().st_size  # in float32, as on the CPU, it takes two thirds of that
    engine = DiffusionEngine("cpu", budget_bytes)
    most: list[int] = []

    class Watching(Engine):
        def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
            def step(done: int, total: int) -> None:
                most.append(sum(found.size_bytes for found in engine.resident().values()))
                progress(done, total)

            return engine.make(request, step, cancel)

    engines = Router({"sd-cpp": Watching}, preparers=PREPARERS)
    given = Given({"sample": SAMPLE, "other": other})
    sources = [Source(*(sample_job(f"{model}{n}", model) for n in range(4))) for model in ("sample", "other")]
    lanes = [
        lane_ports(tmp_path / str(number), source, engines, files=given)
        for number, source in enumerate(sources, 1)
    ]
    worker = Worker(lanes, lambda: 60.0)
    worker.run()
    assert [source.failures for source in sources] == [[], []]
    assert [len(source.finished_jobs) for source in sources] == [4, 4]
    assert worker.turns.switches >= 1
    assert budget_bytes / 2 < max(most) <= budget_bytes
