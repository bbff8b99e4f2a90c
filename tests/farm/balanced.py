"""Two studio processes behind a load balancer with a certificate, as its shipped example has it."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import requests

from studio_worker.local_studio import LocalStudio, Places, pictures_at
from tests.fakes.certificates import Certificate, certificate
from tests.fakes.machine import WAIT_S, Machine
from tests.fakes.servers import free_port
from tests.farm.studios import Balancer, StudioProcess
from tests.lab.balancers import Recipe, running
from tests.lab.programs import program
from tests.lab.service import await_that

TOKEN = "a token of sufficient length"


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

    def await_asked(self, process: StudioProcess) -> None:
        """Until the balancer knows that it is there again, and sends people to it."""
        url, headers = f"http://127.0.0.1:{process.port}/metrics", {"Authorization": f"Bearer {TOKEN}"}
        await_that(
            lambda: 'part="page"' in requests.get(url, headers=headers, timeout=WAIT_S).text,
            "the balancer sends somebody there",
        )


@contextmanager
def balanced(
    recipe: Recipe, database_url: str, pictures: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """All of it at work, and trusted by whatever is started from here.

    Args:
        pictures: where they lie.
    """
    program(recipe.__name__)  # before anything is started
    shown, port = certificate(folder), free_port()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(shown.authority))
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    options = ("--database", database_url, "--pictures", pictures)
    options += ("--token-file", str(token), "--behind-proxy", "127.0.0.1")
    processes = [StudioProcess(name, folder, options, {}) for name in ("north", "south")]
    with Desk(Places(database_url, pictures_at(pictures))) as desk:
        desk.address = f"https://127.0.0.1:{port}"
        site = Site(database_url, desk, processes, shown)
        try:
            for process in processes:
                process.start()
            site.await_ready()
            studios = [f"127.0.0.1:{process.port}" for process in processes]
            with running(recipe(folder, shown, port, studios), port, folder / "log"):
                yield site
        finally:
            for process in processes:
                process.send(signal.SIGKILL)
                asyncio.run(process.ended())
