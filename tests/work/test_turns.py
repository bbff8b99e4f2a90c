"""Who has the device, and what the others do meanwhile: lanes, their turns, and the thread that gives them.

Nothing is timed: a lane that had to wait where it must not would wait for ever, and the test would fail at
its limit.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from studio_worker.engine import Engine, Made, Request, Router, StepProgress
from studio_worker.errors import DeviceError, JobError, JobImpossible
from studio_worker.jobs import Cancel, Job, Picture
from studio_worker.report.activity import Activity
from studio_worker.work.turns import Turns
from studio_worker.work.worker import Worker
from tests.fakes.played import Encoding
from tests.fakes.scripted import LIMIT_S
from tests.lab.worker import Source, job, lane_ports, make

PICTURE = Picture(b"picture", "png", {"seed": 1}, {})


class TwoStageEngine(Engine):
    """Does for each job what the test says, at the device and while its picture is encoded."""

    def __init__(
        self,
        at_device: dict[str, Callable[[Cancel], object]],
        encoding: dict[str, Callable[[], object]] | None = None,
    ) -> None:
        self._at_device = at_device
        self._encoding = encoding or {}

    def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
        self._at_device.get(request.job_id, lambda cancel: None)(cancel)
        return Encoding(PICTURE, self._encoding.get(request.job_id, lambda: None))


class After(Source):
    """Gives out its jobs once something has happened."""

    def __init__(self, event: threading.Event, *jobs: Job) -> None:
        super().__init__(*jobs)
        self._event = event

    def take(self, rest: Callable[[], None]) -> Job | None:
        met(self._event)
        return super().take(rest)


def lanes(folder: Path, engine: Engine, *sources: Source) -> Worker:
    """A worker with a lane for each of ``sources``."""
    engines = Router({"scripted": lambda: engine})
    ports = [lane_ports(folder / str(number), source, engines) for number, source in enumerate(sources)]
    return Worker(ports, lambda: 60.0)


def met(event: threading.Event) -> None:
    assert event.wait(LIMIT_S)


def test_device_is_free_while_a_picture_is_encoded(tmp_path: Path) -> None:
    """While one lane's picture is encoded, the next lane's is made."""
    encoding, made = threading.Event(), threading.Event()

    def encode_a() -> None:
        encoding.set()
        met(made)

    first, second = Source(job("a")), After(encoding, job("b"))
    engine = TwoStageEngine({"b": lambda cancel: made.set()}, {"a": encode_a})
    lanes(tmp_path, engine, first, second).run()
    assert first.failures == second.failures == []


def test_thread_that_runs_the_worker_runs_the_engine_and_nothing_else(tmp_path: Path) -> None:
    """Also with one lane the engine is called from the one thread that runs the worker, and files, inputs,
    encoding and keeping have another.
    """
    threads: dict[str, int] = {}

    def note(what: str) -> None:
        threads[what] = threading.get_ident()

    def fetch(url: str, cancel: threading.Event) -> bytes:
        note("input")
        return b"input"

    engine = TwoStageEngine({"a": lambda cancel: note("engine")}, {"a": lambda: note("encoding")})
    source = Source(job("a", init_image_url="https://x/i.png"))
    worker, outbox, _ = make(tmp_path, source, make_engine=lambda: engine, fetch=fetch)
    worker.run()
    assert outbox.holds("a")
    assert threads["engine"] == threading.get_ident()
    assert threads["input"] == threads["encoding"] != threads["engine"]


def test_lane_that_waits_for_the_device_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another lane has the device, a job whose files are there is told as waiting for its turn."""
    activity, at_device, waits = Activity(), threading.Event(), threading.Event()
    records = [activity.lane(1), activity.lane(2)]
    told: list[str] = []
    really_waits = records[1].job_waits

    def wait() -> None:
        really_waits()
        waits.set()

    def make_a(cancel: Cancel) -> None:
        at_device.set()
        met(waits)
        told.extend(lane.job.stage for lane in activity.snapshot().lanes if lane.job is not None)

    monkeypatch.setattr(records[1], "job_waits", wait)
    engines = Router({"scripted": lambda: TwoStageEngine({"a": make_a})})
    ports = []
    for record, name, source in zip(
        records, "ab", (Source(job("a")), After(at_device, job("b"))), strict=True
    ):
        record.job_began(name, "m")
        ports.append(replace(lane_ports(tmp_path / name, source, engines), reports=record))
    Worker(ports, lambda: 60.0).run()
    assert told == ["load", "turn"]


def test_lanes_never_share_the_device(tmp_path: Path) -> None:
    """However many lanes there are, one picture is made at a time."""
    at_work: list[str] = []
    most: list[int] = []

    def work(job_id: str) -> Callable[[Cancel], None]:
        def act(cancel: Cancel) -> None:
            at_work.append(job_id)
            most.append(len(at_work))
            at_work.remove(job_id)

        return act

    ids = [[f"{lane}{number}" for number in range(20)] for lane in "abc"]
    engine = TwoStageEngine({job_id: work(job_id) for lane in ids for job_id in lane})
    sources = [Source(*map(job, lane)) for lane in ids]
    lanes(tmp_path, engine, *sources).run()
    assert [source.finished_jobs for source in sources] == ids
    assert set(most) == {1}


@pytest.mark.parametrize(
    ("error", "reason", "retryable"),
    [
        (JobImpossible("unknown ext"), "unknown ext", False),
        (JobError("the picture could not be made: OSError"), "the picture could not be made: OSError", True),
        (RuntimeError("a hidden castle"), "internal error: RuntimeError", True),
    ],
)
def test_picture_that_cannot_be_encoded_is_reported(
    tmp_path: Path, error: Exception, reason: str, retryable: bool
) -> None:
    """A failure while a picture is encoded is the job's, with its reason; the next job is made."""

    def fail() -> None:
        raise error

    source = Source(job("a"), job("b"))
    engine = TwoStageEngine({}, {"a": fail})
    worker, outbox, in_hand = make(tmp_path, source, make_engine=lambda: engine)
    worker.run()
    assert source.failures == [("a", reason, retryable)]
    assert [d.job_id for d in outbox.oldest()] == ["b"]
    assert in_hand.recover() == []


def test_job_that_waits_for_the_device_is_handed_back_at_once(tmp_path: Path) -> None:
    """Told to end, a lane that waits for its turn does not wait for the step of another one."""
    begun, handed_back = threading.Event(), threading.Event()

    class Telling(After):
        def report_failure(self, job_id: str, error: str, *, retryable: bool) -> None:
            super().report_failure(job_id, error, retryable=retryable)
            handed_back.set()

    def hang(cancel: Cancel) -> None:
        begun.set()
        met(handed_back)
        cancel.check()

    first, second = Source(job("a")), Telling(begun, job("b"))
    worker = lanes(tmp_path, TwoStageEngine({"a": hang}), first, second)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    met(begun)
    worker.hand_back("the worker is stopping")
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert first.failures == [("a", "the worker is stopping", True)]
    assert second.failures == [("b", "the worker is stopping", True)]


def test_lost_device_ends_all_lanes(tmp_path: Path) -> None:
    """Where one lane's job loses the device, the picture of another that is being encoded is kept, its next
    job is not made, and the service hears of it.
    """
    encoding, lost = threading.Event(), threading.Event()

    def lose(cancel: Cancel) -> None:
        lost.set()
        raise DeviceError("GPU lost; reboot")

    def encode_a() -> None:
        encoding.set()
        met(lost)

    first, second = Source(job("a"), job("c")), After(encoding, job("b"))
    worker = lanes(tmp_path, TwoStageEngine({"b": lose}, {"a": encode_a}), first, second)
    with pytest.raises(DeviceError):
        worker.run()
    assert second.failures == [("b", "GPU lost; reboot", True)]
    assert [failure[0] for failure in first.failures] in ([], ["c"])
    assert len(list((tmp_path / "0" / "outbox").glob("*.data"))) == 1
    assert not (tmp_path / "0" / "spool" / "job-in-hand.json").exists()
    assert (tmp_path / "1" / "spool" / "job-in-hand.json").exists()


def test_lane_that_crashes_is_not_left_behind(tmp_path: Path) -> None:
    """A fault of ours in one lane's thread ends the work, and no lane goes on taking jobs it cannot make."""

    class Broken(Source):
        def take(self, rest: Callable[[], None]) -> Job | None:
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        lanes(tmp_path, TwoStageEngine({}), Broken(), Source(job("a"))).run()


def test_failed_job_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """What a failed job had made is gone with it, without waiting for Python's collector."""

    class Tensors:
        pass

    held: list[weakref.ref[Tensors]] = []
    left: list[object] = []

    def fail(cancel: Cancel) -> None:
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        raise JobError("NaN")

    engine = TwoStageEngine({"a": fail, "b": lambda cancel: left.append(held[0]())})
    worker, _, _ = make(tmp_path, Source(job("a"), job("b")), make_engine=lambda: engine)
    gc.disable()
    try:
        worker.run()
    finally:
        gc.enable()
    assert left == [None]


def test_device_is_free_when_nobody_has_it_or_waits() -> None:
    """Who finds the device taken waits for another lane's picture, and only that is told as such."""
    turns, begun, go_on = Turns(), threading.Event(), threading.Event()
    serving = threading.Thread(target=turns.serve, daemon=True)
    assert turns.is_free()

    def work() -> None:
        begun.set()
        met(go_on)

    turn = turns.ask(work, "m")
    serving.start()
    met(begun)
    assert not turns.is_free()
    go_on.set()
    turn.result(LIMIT_S)
    turns.close()
    serving.join(LIMIT_S)
    assert turns.is_free()
    assert turns.ask(work, "m").cancelled()
