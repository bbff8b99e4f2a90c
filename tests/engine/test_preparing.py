"""Input pictures are decoded while another lane has the device, and not in their own lane's turn."""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio_worker.engine import Engine, Inputs, Router, default_router, images
from studio_worker.engine.pictures import decoder
from studio_worker.engine.router import PREPARERS
from studio_worker.jobs import Cancel, ImageTask, Job
from studio_worker.models import ModelSource
from studio_worker.work.ports import Ports
from studio_worker.work.worker import Worker
from tests.fakes.played import NoFiles
from tests.fakes.scripted import LIMIT_S
from tests.lab.engine import SAMPLE, SMALL, encoded, request, scene
from tests.lab.worker import Source, lane_ports

SD = ModelSource(engine="sd-cpp", cli_defaults=SMALL)
PICTURE = encoded(scene())


class Sample(NoFiles):
    """A store that has the sample model."""

    def taken(self, model: str, files: Any, **watching: Any) -> Any:
        return contextlib.nullcontext((SAMPLE,))


def sample_job(job_id: str, **task: Any) -> Job:
    return Job(job_id, "sample", ImageTask(**{"prompt": "a red gem", "ext": "png", "seed": 3, **task}), SD)


def ports(folder: Path, source: Source, engines: Router, data: bytes = PICTURE) -> Ports:
    return lane_ports(folder, source, engines, files=Sample(), fetch=lambda url, cancel: data)


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fifo: the process that decodes begins when somebody has opened it for writing."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    child = shlex.join(decoder._COMMAND)
    monkeypatch.setattr(
        decoder, "_COMMAND", ("sh", "-c", f'cat {shlex.quote(str(path))}; exec {child} "$@"', "sh")
    )
    images.close()
    return path


class Later(Source):
    """Gives out its job once something has begun, and tells that it has ended."""

    def __init__(self, begun: threading.Event, ended: threading.Event, *jobs: Job) -> None:
        super().__init__(*jobs)
        self._begun, self._ended = begun, ended

    def take(self, rest: Callable[[], None]) -> Job | None:
        assert self._begun.wait(LIMIT_S)
        return super().take(rest)

    def finished(self, job: Job) -> None:
        super().finished(job)
        self._ended.set()


def test_picture_is_made_while_another_lanes_input_is_decoded(tmp_path: Path, gate: Path) -> None:
    """However long a job's input picture takes to decode, another lane's picture is made meanwhile."""
    decoding, made = threading.Event(), threading.Event()
    told: list[bool] = []

    def watch() -> None:
        with gate.open("wb"):  # which it is as soon as the other side reads
            decoding.set()
            told.append(made.wait(LIMIT_S))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    engines = default_router("cpu")
    first = Source(sample_job("a", init_image_url="https://x/i.png"))
    second = Later(decoding, made, sample_job("b"))
    Worker(
        [ports(tmp_path / "1", first, engines), ports(tmp_path / "2", second, engines)], lambda: 60.0
    ).run()
    watching.join(LIMIT_S)
    images.close()
    assert told == [True]
    assert first.failures == second.failures == []


def test_lane_whose_input_waits_for_anothers_can_be_handed_back(tmp_path: Path, gate: Path) -> None:
    """A job that waits until another one's pictures are decoded is handed back at once, and that one too."""
    decoding, asked = threading.Event(), threading.Event()

    def fetch(url: str, cancel: threading.Event) -> bytes:
        asked.set()
        return PICTURE

    engines = default_router("cpu")
    first = Source(sample_job("a", init_image_url="https://x/i.png"))
    second = Later(decoding, threading.Event(), sample_job("b", init_image_url="https://x/i.png"))
    lanes = [
        ports(tmp_path / "1", first, engines),
        replace(ports(tmp_path / "2", second, engines), fetch=fetch),
    ]
    worker = Worker(lanes, lambda: 60.0)
    working = threading.Thread(target=worker.run, daemon=True)
    working.start()
    with gate.open("wb"):
        decoding.set()
        assert asked.wait(LIMIT_S)
        worker.hand_back("the worker is stopping")
        working.join(LIMIT_S)
        assert not working.is_alive()
    images.close()
    assert first.failures == [("a", "the worker is stopping", True)]
    assert second.failures == [("b", "the worker is stopping", True)]


@pytest.mark.parametrize(
    ("task", "data", "reason"),
    [
        ({"init_image_url": "https://x/i.png"}, b"%PDF-1.7", "is a PDF document"),
        ({"init_image_url": "https://x/i.png"}, PICTURE[: len(PICTURE) // 2], "is damaged or cut short"),
        ({"mask_url": "https://x/m.png"}, PICTURE, "maskUrl without initImageUrl"),
        ({"ext": "gif"}, PICTURE, "unknown ext"),
        ({"width": 100_000}, PICTURE, "is outside"),
    ],
    ids=["PDF", "half", "mask alone", "format", "size"],
)
def test_bad_job_never_has_a_turn(tmp_path: Path, task: dict[str, Any], data: bytes, reason: str) -> None:
    """What is wrong with a job's pictures or parameters is told without the device, or any engine."""

    def refuse() -> Engine:
        raise AssertionError("it had a turn")

    engines = Router({"sd-cpp": refuse}, preparers=PREPARERS)
    source = Source(sample_job("a", **task))
    Worker([ports(tmp_path, source, engines, data)], lambda: 60.0).run()
    (failure,) = source.failures
    assert reason in failure[1]
    assert not failure[2]


def test_prepared_request_gives_the_picture_of_the_plain_one() -> None:
    """Prepared or not, a request gives the same bytes, and what was fetched for it is held no longer."""
    inputs = Inputs(init_image=PICTURE, mask=encoded(scene()))
    plain = request(inputs=inputs, denoise=0.6)
    engines = default_router("cpu")
    prepared = engines.prepared(SD, plain, lambda: None)
    assert prepared.inputs == Inputs()
    made = [
        engines.for_source(SD).generate(each, lambda done, total: None, Cancel())
        for each in (plain, prepared)
    ]
    assert made[0].data == made[1].data
