"""Two studio processes behind the shipped examples of load balancers, while one after the other goes."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.fakes.machine import PICTURE, queue
from tests.farm.balanced import TOKEN, Site, balanced
from tests.lab.balancers import RECIPES, WAIT_S

BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe.__name__)
def site(
    request: pytest.FixtureRequest, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    with balanced(request.param, database_url, str(tmp_path / "pictures"), tmp_path, monkeypatch) as running:
        yield running


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
            site.await_asked(process)
            machine.beat(job_id)
    finally:
        person.end()
    assert person.failed == []
    assert person.asked > 20
    assert machine.upload(job_id).status_code == 200
    job = site.desk.job(job_id)
    assert (job.status, job.attempts, job.completions) == ("done", 1, 1)
    machine.hang_up()
