"""A studio process killed while a picture is on its way in: at each stage the bytes go through."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import psycopg
import pytest
import requests

from studio_worker.local_studio import LocalStudio, Places, pictures_at
from studio_worker.local_studio.pictures.s3 import PART_BYTES
from tests.fakes.machine import PICTURE, WAIT_S, Machine, queue
from tests.farm.s3 import S3Server
from tests.farm.s3_proxy import S3Proxy
from tests.farm.studios import Balancer, StudioProcess
from tests.lab.service import await_that

CONTENT = PICTURE + bytes(PART_BYTES)
"""Goes to S3 in two parts."""


class Place(Protocol):
    """Where the pictures lie."""

    option: str
    environment: Mapping[str, str]
    """Of the process that is killed."""

    def held(self) -> list[str]:
        """All that lies there, whole or not, but the mark."""

    def stall(self, is_stalled: bool) -> None:
        """Whether what is begun there does not get on."""


class FolderPlace:
    """A folder whose disk never says that it has written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "pictures"
        self._stalled = folder / "stalled"
        self.option = str(self._folder)
        (folder / "code").mkdir()
        (folder / "code" / "sitecustomize.py").write_text(
            "import os, time\n"
            "synced = os.fsync\n"
            "def fsync(descriptor):\n"
            f"    while os.path.exists({str(self._stalled)!r}):\n"
            "        time.sleep(0.02)\n"
            "    synced(descriptor)\n"
            "os.fsync = fsync\n"
        )
        path = f"{folder / 'code'}:{os.environ.get('PYTHONPATH', '')}"
        self.environment = {"PYTHONPATH": path}

    def held(self) -> list[str]:
        return [path.name for path in self._folder.iterdir() if path.name != "studio"]

    def stall(self, is_stalled: bool) -> None:
        if is_stalled:
            self._stalled.touch()
        else:
            self._stalled.unlink()


class S3Place:
    """S3 storage that does not answer to the parts of an upload."""

    environment: Mapping[str, str] = {}

    def __init__(self, server: S3Server, bucket: str, proxy: S3Proxy) -> None:
        self._server = server
        self._bucket = bucket
        self._proxy = proxy
        self.option = f"s3://{bucket}/p"

    def held(self) -> list[str]:
        begun = self._server.client().list_multipart_uploads(Bucket=self._bucket).get("Uploads", ())
        whole = [key for key in self._server.keys(self._bucket) if key != "p/studio"]
        return [*whole, *(entry["Key"] for entry in begun)]

    def stall(self, is_stalled: bool) -> None:
        self._proxy.faults.silent_to = "PUT" if is_stalled else None


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "folder":
        yield FolderPlace(tmp_path)
        return
    server: S3Server = request.getfixturevalue("s3_server")
    bucket: str = request.getfixturevalue("bucket")
    with S3Proxy(server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        yield S3Place(server, bucket, proxy)


class Farm:
    """Two processes of a studio, and a third at which the test sits. ``job_id`` is in the hand of the worker,
    whose session is with the first.
    """

    def __init__(self, url: str, desk: LocalStudio, processes: list[StudioProcess], scratch: Path) -> None:
        self.url = url
        self.desk = desk
        self.north, self.south = processes
        self.scratch = scratch
        self.machine = Machine(desk)
        self.job_id = queue(desk)
        self.turn_to(self.north)
        self.machine.take()
        self.machine.beat(self.job_id)

    def turn_to(self, process: StudioProcess) -> None:
        self.machine.api = f"http://127.0.0.1:{process.port}/graphics/api"
        self.machine.connect()

    def upload_in_vain(self) -> None:
        """As far as it gets."""
        with contextlib.suppress(requests.RequestException):
            self.machine.upload(self.job_id, CONTENT)

    def kill(self) -> None:
        """Of the process that the worker talks to nothing is left, and nothing it did is seen."""
        self.north.send(signal.SIGKILL)
        asyncio.run(self.north.ended())
        assert list(self.scratch.iterdir()) == []
        assert self.desk.job(self.job_id).status == "running"
        shown = requests.get(f"{self.desk.base_url}/api/jobs/{self.job_id}/result", timeout=WAIT_S)
        assert shown.status_code == 404


@pytest.fixture
def farm(database_url: str, place: Place, tmp_path: Path) -> Iterator[Farm]:
    (tmp_path / "scratch").mkdir()
    options = ("--database", database_url, "--pictures", place.option)
    environment = {"TMPDIR": str(tmp_path / "scratch")}
    processes = [
        StudioProcess("north", tmp_path, options, {**environment, **place.environment}),
        StudioProcess("south", tmp_path, options, environment),
    ]
    with LocalStudio(Places(database_url, pictures_at(place.option))) as desk:
        try:
            for process in processes:
                process.start()
            asyncio.run(Balancer(processes).until(lambda ready: ready == len(processes)))
            yield Farm(database_url, desk, processes, tmp_path / "scratch")
        finally:
            for process in processes:
                process.send(signal.SIGKILL)
                asyncio.run(process.ended())


def arrives_once(farm: Farm, place: Place) -> None:
    """The worker delivers to the other process; after a day nothing is left but that."""
    farm.turn_to(farm.south)
    farm.machine.beat(farm.job_id)
    assert farm.machine.upload(farm.job_id, CONTENT).status_code == 200
    job = farm.desk.job(farm.job_id)
    assert (job.status, job.attempts, job.completions, job.refused_uploads) == ("done", 1, 1, 0)
    assert farm.desk.result(farm.job_id) == CONTENT
    farm.desk.housekeeping.sweep(0.0, time.time() + WAIT_S)
    assert len(place.held()) == 1
    assert farm.desk.result(farm.job_id) == CONTENT
    farm.machine.hang_up()


def test_process_killed_while_it_receives(farm: Farm, place: Place) -> None:
    """kill -9 when half of an upload has come: nothing of it is left, and it arrives at the other process."""
    request = requests.Request(
        "POST",
        f"{farm.machine.api}/workers/{farm.machine.worker_id}/jobs/{farm.job_id}/complete",
        headers={"Authorization": f"Bearer {farm.machine.token}"},
        data={"prompt": "a red fox", "ext": "webp"},
        files={"image": ("picture.webp", CONTENT, "image/webp")},
    ).prepare()
    assert isinstance(request.body, bytes)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", farm.north.port)) as connection:
        connection.sendall(f"POST {request.path_url} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
        connection.sendall(request.body[: len(CONTENT) // 2])
        await_that(lambda: in_scratch(farm) >= len(CONTENT) // 4, "much of it has come")
        farm.kill()
    assert place.held() == []
    arrives_once(farm, place)


def test_process_killed_while_it_writes(farm: Farm, place: Place) -> None:
    """kill -9 when a part of the picture has been written: it is no picture, and it goes after a day."""
    place.stall(True)
    uploading = threading.Thread(target=farm.upload_in_vain)
    uploading.start()
    await_that(lambda: len(place.held()) == 1, "it has been begun")
    farm.kill()
    uploading.join()
    place.stall(False)
    assert len(place.held()) == 1
    arrives_once(farm, place)


def test_process_killed_between_the_picture_and_its_row(farm: Farm, place: Place) -> None:
    """kill -9 when the picture lies there, and nobody knows it yet: it is not shown, and goes after a day."""
    with psycopg.connect(farm.url) as connection:
        connection.execute("SELECT 1 FROM jobs WHERE job_id = %s FOR UPDATE", (farm.job_id,))
        uploading = threading.Thread(target=farm.upload_in_vain)
        uploading.start()
        await_that(lambda: any(farm.job_id in name for name in place.held()), "the picture is there")
        farm.kill()
        uploading.join()
    assert len(place.held()) == 1
    arrives_once(farm, place)


def in_scratch(farm: Farm) -> int:
    """How many bytes the process has in a temporary file, which has no name."""
    sizes = [0]
    for entry in Path(f"/proc/{farm.north.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if entry.readlink().is_relative_to(farm.scratch):
                sizes.append(entry.stat().st_size)
    return max(sizes)
