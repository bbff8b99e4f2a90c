"""Two studio processes behind the shipped examples of load balancers, while one after the other goes."""

from __future__ import annotations

import asyncio
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import requests

from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.pictures import Folder
from tests.fakes.certificates import Certificate, certificate
from tests.fakes.machine import PICTURE, Machine, queue
from tests.fakes.servers import free_port
from tests.farm.studios import Balancer, StudioProcess
from tests.lab.balancers import RECIPES, WAIT_S, Recipe, running
from tests.lab.programs import program

TOKEN = "a token of sufficient length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Desk(LocalStudio):
    """A third process of the studio, at which the test sits; the balancer sends nobody here."""

    address = ""

    @property
    def base_url(self) -> str:
        """Where workers find the studio."""
        return self.address


class Site:
    """A balancer with two processes behind it."""

    def __init__(self, url: str, desk: Desk, processes: list[StudioProcess], shown: Certificate) -> None:
        self._url = url
        self.desk = desk
        self.processes = processes
        self._tls = ssl.create_default_context(cafile=shown.authority)

    def worker(self) -> Machine:
        """One that is let in, with its session."""
        machine = Machine(self.desk, approve=False)
        machine.fetch_token()
        return self.connect(machine)

    def connect(self, machine: Machine) -> Machine:
        return machine.connect(tls=self._tls)

    def holder(self) -> StudioProcess:
        """The process that the worker's session is with."""
        query = "SELECT address FROM sessions JOIN processes USING (process_id)"
        with psycopg.connect(self._url) as connection:
            ((address,),) = connection.execute(query).fetchall()
        return next(process for process in self.processes if address.endswith(f":{process.port}"))

    def await_ready(self) -> None:
        asyncio.run(Balancer(self.processes).until(lambda ready: ready == len(self.processes)))


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe.__name__)
def site(
    request: pytest.FixtureRequest, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    recipe: Recipe = request.param
    program(recipe.__name__)  # before anything is started
    shown, port = certificate(tmp_path), free_port()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(shown.authority))
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    options = ("--database", database_url, "--pictures", str(tmp_path / "pictures"))
    options += ("--token-file", str(token), "--behind-proxy", "127.0.0.1")
    processes = [StudioProcess(name, tmp_path, options, {}) for name in ("north", "south")]
    with Desk(Places(database_url, Folder(tmp_path / "pictures"))) as desk:
        desk.address = f"https://127.0.0.1:{port}"
        running_site = Site(database_url, desk, processes, shown)
        try:
            for process in processes:
                process.start()
            running_site.await_ready()
            studios = [f"127.0.0.1:{process.port}" for process in processes]
            with running(recipe(tmp_path, shown, port, studios), port, tmp_path / "log"):
                yield running_site
        finally:
            for process in processes:
                process.send(signal.SIGKILL)
                asyncio.run(process.ended())


class Person(threading.Thread):
    """Asks and logs in through the balancer, on a connection that stays open, until told to stop."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._is_over = threading.Event()
        self.asked = 0
        self.failed: list[str] = []

    def run(self) -> None:
        """Ask again and again."""
        with requests.Session() as session:
            session.headers.update(BEARER)
            while not self._is_over.is_set():
                self._once(session, "GET", "/api/state")
                self._once(session, "POST", "/login")
                self._is_over.wait(0.02)  # no more than people do

    def _once(self, session: requests.Session, method: str, path: str) -> None:
        self.asked += 1
        try:
            answer = session.request(
                method,
                f"{self._address}{path}",
                data={"token": TOKEN} if method == "POST" else None,
                headers={"Origin": self._address},
                timeout=WAIT_S,
            )
            if answer.status_code != 200:
                self.failed.append(f"{path}: {answer.status_code}")
        except requests.RequestException as error:
            self.failed.append(f"{path}: {error}")

    def end(self) -> None:
        """Wait for the last answer."""
        self._is_over.set()
        self.join()


def test_killed_process_costs_a_worker_its_connection_only(site: Site) -> None:
    """kill -9 of the process behind a session: the next dial reaches the other, with the job, and so do the
    picture and whoever asks.
    """
    machine = site.worker()
    job_id = queue(site.desk)
    machine.take()
    machine.beat(job_id)
    killed = site.holder()
    killed.send(signal.SIGKILL)
    asyncio.run(killed.ended())
    machine.closing()
    site.connect(machine).beat(job_id)
    for _ in range(4):  # also when it is the other one's turn
        answer = requests.get(f"{site.desk.base_url}/api/state", headers=BEARER, timeout=WAIT_S)
        assert answer.status_code == 200
    content = PICTURE + bytes(3_000_000)
    assert machine.upload(job_id, content).status_code == 200
    job = site.desk.job(job_id)
    assert (job.status, job.attempts, job.completions) == ("done", 1, 1)
    assert site.desk.result(job_id) == content
    machine.hang_up()


def test_rolling_restart_fails_no_request_and_no_job(site: Site) -> None:
    """While one process after the other is stopped and started, all that people ask is answered, and the
    worker goes on with its job.
    """
    machine = site.worker()
    job_id = queue(site.desk)
    machine.take()
    machine.beat(job_id)
    person = Person(site.desk.base_url)
    person.start()
    try:
        for process in site.processes:
            is_ours = site.holder() is process
            process.send(signal.SIGTERM)
            assert asyncio.run(process.ended()) == 0
            if is_ours:
                assert machine.closing()[1] == 1012
                site.connect(machine).beat(job_id)
            process.start()
            site.await_ready()
            machine.beat(job_id)
    finally:
        person.end()
    assert person.failed == []
    assert person.asked > 20
    assert machine.upload(job_id).status_code == 200
    job = site.desk.job(job_id)
    assert (job.status, job.attempts, job.completions) == ("done", 1, 1)
    machine.hang_up()
