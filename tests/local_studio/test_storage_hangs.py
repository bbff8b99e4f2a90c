"""What keeps the pictures may hang, a folder on the network say: then only what needs it waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import anyio
import pytest
import requests
from anyio import to_thread

from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.pictures import Folder, Reading, StoredBytes
from studio_worker.local_studio.web.stored import THREADS as STORED
from tests.fakes.machine import PICTURE, SOURCE, WAIT_S, Machine, queue

THREADS = 40
"""That all routes share: anyio's default."""
MODEL = b"weights"


class Hanging(Folder):
    """A folder that hangs until ``goes_on``; ``waiting`` is released by each who waits for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.goes_on = threading.Event()
        self.waiting = threading.Semaphore(0)

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        self.hang()
        return super().put(content, name, ext)

    def open(self, key: str, asked: str | None = None, /) -> Reading:
        self.hang()
        return super().open(key, asked)

    def hang(self) -> None:
        self.waiting.release()
        self.goes_on.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Hanging]:
    hanging = Hanging(tmp_path / "pictures")
    yield hanging
    hanging.goes_on.set()


@pytest.fixture
def studio(tmp_path: Path, folder: Hanging) -> Iterator[LocalStudio]:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").write_bytes(MODEL)
    places = Places(tmp_path / "studio.sqlite3", folder)
    with LocalStudio(places, models_dir=tmp_path / "models") as running:
        yield running


def test_json_results_that_cannot_be_stored_take_nothing_else_with_them(
    studio: LocalStudio, folder: Hanging
) -> None:
    """However many text jobs end while the storage hangs, model files, probes and metrics are served; then
    all of them are done.
    """
    chat, source = {"kind": "llm", "messages": []}, SOURCE | {"engine": "llama-cpp"}
    machines = [Machine(studio, name=f"box-{number}").connect() for number in range(THREADS + 1)]
    jobs = [studio.queue_job(model="m", task=chat, model_source=source) for _ in machines]
    for machine in machines:
        machine.say("completeJson", jobId=machine.take()["jobId"], result={}, prompt="hi")
    for path in ("/models/tiny", "/health/ready", "/metrics", "/api/state"):
        assert requests.get(f"{studio.base_url}{path}", timeout=WAIT_S).status_code == 200
    folder.goes_on.set()
    for machine in machines:
        assert machine.hear()["type"] == "completeAck"
    assert {studio.job(job_id).status for job_id in jobs} == {"done"}
    for machine in machines:
        machine.hang_up()


def ask_many(url: str, count: int) -> tuple[list[threading.Thread], list[bytes]]:
    contents: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: contents.append(requests.get(url, timeout=10 * WAIT_S).content))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, contents


def test_gallery_on_a_disk_that_hangs_takes_nothing_else_with_it(
    studio: LocalStudio, folder: Hanging
) -> None:
    """However many pictures are asked for from a folder that hangs, model files, probes and metrics are
    served; then all pictures are.
    """
    folder.goes_on.set()
    machine, job_id = Machine(studio).connect(), queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    machine.hang_up()
    folder.goes_on.clear()
    threads, contents = ask_many(f"{studio.base_url}/api/jobs/{job_id}/result", THREADS + 1)
    for _ in range(STORED + 1):  # and the upload
        assert folder.waiting.acquire(timeout=WAIT_S)
    for path in ("/models/tiny", "/health/ready", "/metrics", "/api/state"):
        assert requests.get(f"{studio.base_url}{path}", timeout=WAIT_S).status_code == 200
    folder.goes_on.set()
    for thread in threads:
        thread.join()
    assert contents == [PICTURE] * (THREADS + 1)


def test_model_files_on_a_disk_that_hangs_take_no_probe_with_them(
    studio: LocalStudio, folder: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many model files are asked for from a disk that hangs, a load balancer and Prometheus hear that
    this studio is well, and pictures are stored and served.
    """
    opens, disk = anyio.open_file, Hanging(folder.path)

    async def open_late(*what: Any, **how: Any) -> Any:
        await to_thread.run_sync(disk.hang)  # as opening it does, in the same threads
        return await opens(*what, **how)

    monkeypatch.setattr(anyio, "open_file", open_late)
    threads, contents = ask_many(f"{studio.base_url}/models/tiny", THREADS)
    for _ in threads:
        assert disk.waiting.acquire(timeout=WAIT_S)
    try:
        folder.goes_on.set()
        machine, job_id = Machine(studio).connect(), queue(studio)
        machine.take()
        assert machine.upload(job_id).status_code == 200
        machine.hang_up()
        for path in (f"/api/jobs/{job_id}/result", "/health/ready", "/metrics", "/api/state", "/"):
            assert requests.get(f"{studio.base_url}{path}", timeout=WAIT_S).status_code == 200
    finally:
        disk.goes_on.set()
        for thread in threads:
            thread.join()
    assert contents == [MODEL] * THREADS
