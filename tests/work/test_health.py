"""A box that fails job after job: what it says, when it tries again, and how it comes back by itself."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from studio_worker.appliance.preparation import try_again
from studio_worker.box.device import Device
from studio_worker.demo import sample_source
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import DeviceError, DownloadError, JobError, JobImpossible, NotServed
from studio_worker.jobs import ImageTask, Job
from studio_worker.local_studio import LocalStudio
from studio_worker.models import ModelFile, ModelSource
from studio_worker.work import breaker
from studio_worker.work.health import Health
from tests.fakes.scripted import LIMIT_S
from tests.fakes.servers import FileServer
from tests.lab.service import LONG, READY_S, SYNTHETIC, await_file, await_status, hurried, status

PAGE = b"<!DOCTYPE html><html><title>Welcome to the hotel's network</title></html>"
MODEL = b"a model" * 1000
SOURCE = ModelSource(engine="sd-cpp")
TASK = ImageTask(prompt="a castle")


def job(model: str = "m", source: ModelSource = SOURCE, task: ImageTask = TASK) -> Job:
    return Job("j", model, task, source)


class Watched:
    """The health of a box whose device says what a test wants, with everything that was said and tried."""

    def __init__(self) -> None:
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.trials: queue.SimpleQueue[str] = queue.SimpleQueue()
        """What the device says next is wrong with it; a try waits for it."""
        self.tries = 0
        self.ends: queue.SimpleQueue[DeviceError] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.health = Health(self.notes.put, try_device=self._try, end=self.ends.put, stop=self.stop)

    def _try(self) -> str:
        self.tries += 1
        return self.trials.get(timeout=LIMIT_S)

    def fail(self, times: int, error: Exception, *models: str) -> None:
        for number in range(times):
            self.health.failed(job((models or ("m",))[number % len(models or "m")]), error)

    def takes(self, model: str = "m", *, fetches: bool = False) -> bool:
        return self.health.refusal(model, SOURCE, TASK, fetches=fetches) is None

    def await_note(self, is_wanted: Callable[[str], bool]) -> str:
        while not is_wanted(text := self.notes.get(timeout=LIMIT_S)):
            pass
        return text


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.stop.set()


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.01)


def test_box_that_fails_job_after_job_says_so(watched: Watched) -> None:
    """Failures in a row that another worker might not have had are told, and what is held back until when;
    a picture ends that.
    """
    watched.fail(2, JobError("out of memory"))
    watched.fail(9, JobImpossible("no such sampler"))
    assert watched.takes()
    watched.fail(1, JobError("out of memory"))
    note = watched.await_note(bool)
    assert note.startswith("no jobs of m until ")
    assert note.endswith(": the last 3 failed: out of memory")
    facts = watched.health.facts()
    assert [(held.model, held.failures) for held in facts.held] == [("m", 3)]
    assert facts.failures == 3
    watched.health.made(job())
    assert watched.await_note(lambda text: text == "") == ""
    assert watched.health.facts().held == ()


def test_crash_is_told_without_its_text(watched: Watched) -> None:
    """A library's error may quote the prompt: the status line and the studio get its kind."""
    watched.fail(3, RuntimeError("a castle burst"))
    refusal = watched.health.refusal("m", SOURCE, TASK, fetches=False)
    assert refusal is not None
    assert refusal.reason.endswith("internal error: RuntimeError")
    assert "castle" not in watched.await_note(bool)


@pytest.mark.usefixtures("_short_pauses")
def test_device_is_tried_out_before_jobs_come_again(watched: Watched) -> None:
    """When the pause is over the device has to pass a try, during which nothing is taken; then jobs come."""
    watched.fail(3, JobError("NaN"))
    watched.await_note(lambda text: text.startswith("trying out the device"))
    assert not watched.takes("another")
    watched.trials.put("")
    watched.await_note(lambda text: text == "the last 3 jobs failed: NaN")
    assert watched.takes("another")
    assert watched.takes()


@pytest.mark.usefixtures("_short_pauses")
def test_network_that_fails_is_no_reason_to_try_the_device(watched: Watched) -> None:
    """Where nothing but fetching failed, the device is left alone, and so are jobs whose files are here."""
    watched.fail(3, DownloadError("request error", "GET x: refused"), "a", "b")
    watched.await_note(lambda text: text.startswith("no jobs that need downloads until"))
    watched.await_note(lambda text: text.startswith("the last 3 jobs failed"))
    assert watched.takes("c", fetches=True)
    assert watched.tries == 0


@pytest.mark.usefixtures("_short_pauses")
def test_device_that_fails_try_after_try_ends_the_process(watched: Watched) -> None:
    """A device that does not come back for this process ends it with 69, so that a new one is started."""
    watched.fail(3, JobError("NaN"))
    for _ in range(breaker.FAILED_TRIES):
        watched.trials.put("cuda:0 computes wrong numbers")
    error = watched.ends.get(timeout=LIMIT_S)
    assert "cuda:0 computes wrong numbers" in str(error)
    assert error.exit_status == 69
    assert watched.tries == breaker.FAILED_TRIES


@pytest.mark.usefixtures("_short_pauses")
def test_try_that_breaks_holds_nothing_back_for_ever(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours in trying the device counts as a failed try, and the next one may pass."""
    answers = iter([OSError("no such program"), ""])

    def broken() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(watched.health, "_try_device", broken)
    watched.fail(3, JobError("NaN"))
    watched.await_note(lambda text: text.startswith("the last "))
    assert watched.takes()


def test_source_that_is_not_served_is_refused_by_all_it_brings(watched: Watched) -> None:
    """What was found to be lacking is remembered for that source and that kind of job, and no other."""
    file = ModelFile(role="model", url="https://x/wan", filename="wan", sha256="0" * 64)
    wan = ModelSource(engine="sd-cpp", files=(file,))
    watched.health.failed(job(source=wan), NotServed("wan is Wan, which this worker does not serve"))
    edit = TASK.model_copy(update={"ref_image_url": "https://x/y"})
    asked = ((wan, TASK), (wan, edit), (SOURCE, TASK))
    answers = [watched.health.refusal("m", *each, fetches=False) for each in asked]
    assert [answer is not None for answer in answers] == [True, False, False]
    assert answers[0] is not None
    assert not answers[0].is_for_now
    for number in range(1000):
        other = ModelSource(engine="sd-cpp", files=(replace(file, sha256=f"{number:064x}"),))
        watched.health.failed(job(source=other), NotServed("no"))
    assert len(watched.health._not_served) <= 200


def test_box_that_dies_in_job_after_job_waits_after_the_start(watched: Watched) -> None:
    """A third process in a row that finds a job in hand takes none at first."""
    watched.health.crashed(2)
    assert watched.takes()
    watched.health.crashed(3)
    assert not watched.takes()
    assert "the process ended in the middle of a job" in watched.await_note(bool)


def test_own_models_leave_the_device_before_it_is_tried() -> None:
    """A trial beside our own models might lack the room. It says what is wrong: here there is no GPU."""
    rested = threading.Event()
    asked: list[str] = []

    def rest() -> list[threading.Event]:
        asked.append("rest")
        rested.set()
        return [rested]

    never = threading.Event()
    assert try_again(Device("cpu", "cpu", 1.0), rest, never) == ""
    assert asked == []
    assert try_again(Device("cuda:99", "a GPU that is not here", 1.0), rest, never) != ""
    assert asked == ["rest"]


# --- the service ---


def queue_jobs(studio: LocalStudio, url: str, count: int) -> list[str]:
    """Jobs of a model whose file is fetched, and then no further looked at."""
    file = {"role": "model", "url": url, "filename": "m", "sha256": hashlib.sha256(MODEL).hexdigest()}
    return [
        studio.queue_job(
            model="behind a portal",
            task={"kind": "image", "prompt": "a castle"},
            model_source={**SYNTHETIC, "files": [file]},
            max_attempts=5,
        )
        for _ in range(count)
    ]


@pytest.mark.welcoming_studio
def test_service_behind_a_captive_portal_burns_no_attempts_and_comes_back_by_itself(
    tmp_path: Path, studio: LocalStudio, site: Path
) -> None:
    """Three failures, then offers are answered "not now", and the status line, `status` and metrics say why;
    when the portal is gone the jobs are done, without a restart.
    """
    environment = hurried(tmp_path, 12.0)
    with FileServer() as server:
        model = server.serve("/model.safetensors", PAGE)
        jobs = queue_jobs(studio, model.url, 3)
        with ServiceProcess(site, tmp_path / "log", environment) as running:
            running.await_message("STATUS=ready, connected; no jobs of behind a portal until", READY_S)
            studio.wait_for(lambda: rejected(running), READY_S)
            facts = status(site)
            # An offer counts an attempt until it is answered, and offers go on.
            studio.wait_for(lambda: settled_attempts(studio, jobs) == 3, READY_S)
            (held,) = facts["health"]["held"]
            assert (held["model"], held["failures"]) == ("behind a portal", 3)
            assert "HTML page" in held["reason"]
            model.content = MODEL
            for each in jobs:
                await_status(studio, each, "done")
            assert status(site)["health"]["held"] == []
            assert running.stop() == 0
    lines = running.log_lines()
    assert sum(line["message"] == "jobs are held back" for line in lines) == 1
    assert {line.get("code") for line in lines if line["message"] == "job rejected"} == {"busy"}


def settled_attempts(studio: LocalStudio, jobs: Sequence[str]) -> int | None:
    """The attempts of all these jobs while none of them is with the worker."""
    now = [studio.job(each) for each in jobs]
    return sum(each.attempts for each in now) if {each.status for each in now} == {"queued"} else None


def rejected(running: ServiceProcess) -> bool:
    return any("failed here" in line.get("reason", "") for line in running.log_lines())


@pytest.mark.welcoming_studio
def test_service_that_died_in_three_jobs_takes_none_at_first(
    tmp_path: Path, studio: LocalStudio, site: Path
) -> None:
    """A box whose process dies with job after job waits after the start, says why, and goes on by itself."""
    note = tmp_path / "work" / "state" / "spool" / "job-in-hand.json"
    jobs = [studio.queue_job(model="m", task=LONG, model_source=sample_source(studio)) for _ in range(3)]
    for job_id in jobs:
        with ServiceProcess(site, tmp_path / "log") as running:
            await_status(studio, job_id, "running")
            await_file(note)
            running.kill()
        studio.wait_for(lambda job_id=job_id: studio.job(job_id).status == "queued", READY_S)
        studio.queue.delete(job_id)
    environment = hurried(tmp_path, 3.0)
    last = studio.queue_job(model="placeholder", task=dict(LONG, steps=2), model_source=SYNTHETIC)
    with ServiceProcess(site, tmp_path / "last", environment) as running:
        running.await_message("STATUS=ready, connected; no jobs until", READY_S)
        studio.wait_for(lambda: rejected(running), READY_S)
        await_status(studio, last, "done")
        assert running.stop() == 0
    assert any("the process ended in the middle of a job" in line for line in running.messages)
