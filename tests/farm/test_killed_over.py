"""The real service before two real studio processes, of which one ends in the middle of a job."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from studio_worker import sample_model
from studio_worker.demo import MODEL_ID, sample_source
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.rules import JobStatus
from tests.fakes.servers import FileServer, ServedFile
from tests.farm.front import Front
from tests.farm.studios import Balancer, StudioProcess
from tests.lab.service import DONE_S, READY_S, await_log, await_status

START_S = 60.0


class Desk(LocalStudio):
    """A third process of the studio, at which the test sits; the front sends nobody here."""

    address = ""

    @property
    def base_url(self) -> str:
        """Where workers find the studio."""
        return self.address


class Farm:
    """Two studio processes behind one address, and a service that knows that address only."""

    def __init__(self, url: str, folder: Path, desk: Desk, front: Front) -> None:
        self._url = url
        self._folder = folder
        self.desk = desk
        self.front = front

    def start(self) -> None:
        """Both processes are ready."""
        options = ("--database", self._url, "--pictures", str(self._folder / "pictures"))
        options += ("--models", str(sample_model.WEIGHTS.parent))
        self.processes = [StudioProcess(name, self._folder, options, {}) for name in ("north", "south")]
        self.front.serve([process.port for process in self.processes])
        for process in self.processes:
            process.start()
        self.await_ready(2)

    def await_ready(self, count: int) -> None:
        asyncio.run(Balancer(self.processes).until(lambda ready: ready == count))

    def holder(self) -> StudioProcess:
        """The process that the service's session is with."""
        query = "SELECT address FROM sessions JOIN processes USING (process_id)"
        with psycopg.connect(self._url) as connection:
            ((address,),) = connection.execute(query).fetchall()
        return next(process for process in self.processes if address.endswith(f":{process.port}"))

    def await_other(self, than: StudioProcess) -> None:
        """Until the service's session is with the other process."""
        self.desk.wait_for(lambda: self._is_online() and self.holder() is not than, READY_S)

    def _is_online(self) -> bool:
        return any(self.desk.is_online(worker.worker_id) for worker in self.desk.workers())

    def queue(self, weights: ServedFile) -> str:
        """A job whose model file is waited for."""
        source = sample_source(self.desk)
        files = tuple(replace(file, url=weights.url) for file in source.files)
        return self.desk.queue_job(
            model=MODEL_ID,
            task={"kind": "image", "prompt": "a red potion", "seed": 1},
            model_source=source.model_copy(update={"files": files}),
        )

    def end(self) -> None:
        for process in self.processes:
            process.send(signal.SIGKILL)
            asyncio.run(process.ended())


@pytest.fixture
def farm(database_url: str, tmp_path: Path) -> Iterator[Farm]:
    with Front() as front, Desk(Places(database_url, Folder(tmp_path / "pictures"))) as desk:
        desk.address = front.url
        running = Farm(database_url, tmp_path, desk, front)
        running.start()
        try:
            yield running
        finally:
            running.end()


@pytest.fixture
def studio(farm: Farm) -> Desk:
    """Whose address the service's configuration has; the model comes with the job."""
    return farm.desk


@pytest.fixture
def service(site: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(site, tmp_path / "service.log") as running:
        running.await_message("READY=1", READY_S)
        yield running


@pytest.fixture
def weights() -> Iterator[ServedFile]:
    """A model file that does not come before it is let go: so long a job that names it is in hand."""
    with FileServer() as server:
        yield server.serve("/weights", sample_model.WEIGHTS.read_bytes(), hold_after=1000)


def arrived_once(farm: Farm, job_id: str) -> None:
    """The job is done at the first attempt, and nothing of it came a second time."""
    await_status(farm.desk, job_id, "done", "failed")
    job = farm.desk.job(job_id)
    assert (job.status, job.attempts, job.completions, job.refused_uploads) == ("done", 1, 1, 0)


def times_accepted(service: ServiceProcess, job_id: str) -> int:
    lines = service.log_lines()
    return sum(line["message"] == "job accepted" and line["job_id"] == job_id for line in lines)


def test_studio_process_killed_in_the_middle_of_a_job(
    farm: Farm, service: ServiceProcess, weights: ServedFile
) -> None:
    """kill -9 of the process that the worker talks to: the picture arrives at the other, once, at no cost."""
    job_id = farm.queue(weights)
    assert weights.held.wait(DONE_S)
    farm.desk.wait_for(lambda: farm.desk.job(job_id).status == "running", DONE_S)
    killed = farm.holder()
    killed.send(signal.SIGKILL)
    farm.await_other(killed)
    weights.release()
    arrived_once(farm, job_id)
    assert times_accepted(service, job_id) == 1
    assert service.stop() == 0


def test_picture_finished_while_no_studio_process_lives(
    farm: Farm, service: ServiceProcess, weights: ServedFile
) -> None:
    """A picture that is finished when all processes are dead arrives when one is started, once."""
    job_id = farm.queue(weights)
    assert weights.held.wait(DONE_S)
    farm.desk.wait_for(lambda: farm.desk.job(job_id).status == "running", DONE_S)
    for process in farm.processes:
        process.send(signal.SIGKILL)
        asyncio.run(process.ended())
    weights.release()
    await_log(service, "delivery has to wait")
    farm.processes[1].start()
    arrived_once(farm, job_id)
    assert service.stop() == 0


def test_rolling_restart_with_a_job_in_hand(farm: Farm, service: ServiceProcess, weights: ServedFile) -> None:
    """One process after the other is stopped and started: no job fails, none is made twice, others go on."""
    job_id = farm.queue(weights)
    assert weights.held.wait(DONE_S)
    for process in farm.processes:
        process.send(signal.SIGTERM)
        assert asyncio.run(process.ended()) == 0
        farm.await_other(process)
        process.start()
        farm.await_ready(2)
    weights.release()
    arrived_once(farm, job_id)
    assert times_accepted(service, job_id) == 1
    after = farm.queue(weights)
    await_status(farm.desk, after, "done", "failed")
    assert farm.desk.queue.counts() == {**dict.fromkeys(JobStatus, 0), "done": 2}
    assert service.stop() == 0


def test_worker_killed_while_it_uploads(farm: Farm, site: Path, weights: ServedFile, tmp_path: Path) -> None:
    """kill -9 of the worker when all but the end of its picture has come: started again it delivers that,
    from its outbox, once, and makes nothing anew.
    """
    weights.release()
    farm.front.withheld_bytes = 100
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        job_id = farm.queue(weights)
        assert farm.front.wait_for("upload", 1, DONE_S)
        running.kill()
    assert farm.desk.job(job_id).completions == 0
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["studio"]
    farm.front.withheld_bytes = 0
    with ServiceProcess(site, tmp_path / "log2") as again:
        arrived_once(farm, job_id)
        assert times_accepted(again, job_id) == 0
        assert again.stop() == 0
    assert len(list((tmp_path / "pictures").glob(f"{job_id}-*"))) == 1
