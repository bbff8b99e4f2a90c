"""Before a large model is fetched its headers are: what cannot be served here is left to another worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from tests.fakes.machine import Machine
from tests.fakes.servers import FileServer, ServedFile
from tests.lab import published
from tests.lab.headers import IQ2_XXS, hollow_gguf, hollow_safetensors, whole
from tests.lab.service import DONE_S, READY_S

pytestmark = pytest.mark.welcoming_studio

MOST_BYTES = 4 * 2**20
"""What a look at headers may cost, of files of tens of gigabytes."""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


def unknown_family() -> dict[str, bytes]:
    """A transformer of names that nobody knows: 20 GB."""
    shapes = {f"towers.{number}.weight": (10_000, 10_000) for number in range(100)}
    return {"diffusion-model": hollow_safetensors(shapes)}


def newer_quantisation() -> dict[str, bytes]:
    """FLUX.1 with a denoiser in a quantisation that ggml has and this worker cannot compute with."""
    return {**whole("flux1-dev"), "diffusion-model": hollow_gguf(published.flux1(), IQ2_XXS)}


def too_large() -> dict[str, bytes]:
    """Qwen-Image in full size: 58 GB, twice as much in single precision, in which a CPU computes."""
    return whole("qwen-image")


def serve(server: FileServer, files: dict[str, bytes], **faults: Any) -> list[ServedFile]:
    return [server.serve(f"/{role}.bin", content, **faults) for role, content in files.items()]


def queue_on_demand(studio: LocalStudio, files: list[ServedFile], engine: str = "sd-cpp") -> str:
    """A job of a model that no worker has yet."""
    entries = []
    for file in files:
        filename = file.url.rpartition("/")[2]
        entries.append({"role": filename.partition(".")[0], "url": file.url, "filename": filename})
    source = {"engine": engine, "files": entries, "cliDefaults": {}}
    task = {"kind": "image", "prompt": "a castle"}
    return studio.queue_job(model="on demand", task=task, model_source=source)


CANNOT = {
    "unknown family": (unknown_family, "is of no known model family"),
    "newer quantisation": (newer_quantisation, "has weights of type IQ2_XXS, which is not served"),
    "too large": (too_large, "GB of memory and"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_model_that_cannot_be_served_here_goes_to_another_worker_unfetched(
    what: str, tmp_path: Path, studio: LocalStudio, site: Path, server: FileServer
) -> None:
    """A model that no worker has yet is judged by its headers before its job is accepted: what is lacking is
    told, another worker gets the job, and of tens of gigabytes a few megabytes were sent at most.
    """
    make, reason = CANNOT[what]
    files = serve(server, make(), hold_after=MOST_BYTES)
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("STATUS=ready, connected", READY_S)
        other = Machine(studio, name="another box", approve=False)
        other.fetch_token()
        other.connect()  # and is offered what the first rejects
        job_id = queue_on_demand(studio, files)
        claim = other.hear(DONE_S)["claim"]
        other.say("accept", jobId=job_id)
        studio.wait_for(lambda: studio.job(job_id).status == "running", DONE_S)
        assert running.stop() == 0
    assert claim["jobId"] == job_id
    assert studio.job(job_id).worker_id == other.worker_id
    (rejection,) = studio.job(job_id).rejections.values()
    assert reason in rejection.reason
    assert sum(file.bytes_sent for file in files) < MOST_BYTES
    messages = [line["message"] for line in running.log_lines()]
    assert "job accepted" not in messages
    assert "download starting" not in messages
    (line, *_) = [line for line in running.log_lines() if line["message"] == "offer judged by its headers"]
    assert line["bytes"] == sum(file.bytes_sent for file in files)
    assert not list((tmp_path / "work" / "models").rglob("*.bin"))
    other.hang_up()
