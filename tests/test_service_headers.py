"""Before a large model is fetched its headers are: what cannot be served here is left to another worker."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from tests.fakes.machine import Machine
from tests.fakes.servers import FileServer, ServedFile
from tests.lab import published
from tests.lab.headers import IQ2_XXS, hollow_gguf, hollow_safetensors, whole
from tests.lab.service import DONE_S, READY_S, await_log, await_status, await_that, hurried

pytestmark = pytest.mark.welcoming_studio

MOST_BYTES = 4 * 2**20
"""What a look at headers may cost, of files of tens of gigabytes."""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


def unknown_family() -> Mapping[str, bytes]:
    """A transformer of names that nobody knows: 20 GB."""
    shapes = {f"towers.{number}.weight": (10_000, 10_000) for number in range(100)}
    return {"diffusion-model": hollow_safetensors(shapes)}


def newer_quantisation() -> Mapping[str, bytes]:
    """FLUX.1 with a denoiser in a quantisation that ggml has and this worker cannot compute with."""
    return {**whole("flux1-dev"), "diffusion-model": hollow_gguf(published.flux1(), IQ2_XXS)}


def too_large() -> Mapping[str, bytes]:
    """FLUX.1 in full size: 34 GB, twice as much in single precision, in which a CPU computes."""
    return whole("flux1-dev")


def serve(server: FileServer, number: int, files: Mapping[str, bytes], **faults: Any) -> list[ServedFile]:
    return [server.serve(f"/{number}/{role}.bin", content, **faults) for role, content in files.items()]


def queue_on_demand(studio: LocalStudio, files: list[ServedFile]) -> str:
    """A job of a model that no worker has yet."""
    entries = []
    for file in files:
        filename = file.url.rpartition("/")[2]
        entries.append({"role": filename.partition(".")[0], "url": file.url, "filename": filename})
    source = {"engine": "sd-cpp", "files": entries, "cliDefaults": {}}
    task = {"kind": "image", "prompt": "a castle"}
    return studio.queue_job(model="on demand", task=task, model_source=source)


CANNOT = (
    (unknown_family, "is of no known model family"),
    (newer_quantisation, "has weights of type IQ2_XXS, which is not served"),
    (too_large, "GB of memory and"),
)


def test_models_that_cannot_be_served_here_go_to_another_worker_unfetched(
    tmp_path: Path, studio: LocalStudio, site: Path, server: FileServer
) -> None:
    """A model that no worker has yet is judged by its headers before its job is accepted: what is lacking is
    told, another worker gets the job, and of tens of gigabytes a few megabytes were sent at most.
    """
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("STATUS=ready, connected", READY_S)
        other = Machine(studio, name="another box", approve=False)
        other.fetch_token()
        other.connect()
        sent = []
        for number, (make, reason) in enumerate(CANNOT):
            files = serve(server, number, make(), hold_after=MOST_BYTES)
            other.beat(job_id="something else")  # the first is asked first
            job_id = queue_on_demand(studio, files)
            studio.wait_for(lambda job_id=job_id: bool(studio.job(job_id).rejections), DONE_S)
            assert other.offered()["jobId"] == job_id
            (rejection,) = studio.job(job_id).rejections.values()
            assert reason in rejection.reason
            sent.append(sum(file.bytes_sent for file in files))
            other.say("fail", jobId=job_id, error="played", retryable=False)
            assert other.hear()["type"] == "failAck"
        assert running.stop() == 0
        other.hang_up()
    assert max(sent) < MOST_BYTES
    assert {line["message"] for line in running.log_lines()}.isdisjoint({"job accepted", "download starting"})
    judged = [line for line in running.log_lines() if line["message"] == "offer judged by its headers"]
    assert [line["bytes"] for line in judged] == sent
    assert not list((tmp_path / "work" / "models").rglob("*.bin"))


def test_heartbeats_go_on_while_a_server_of_headers_hangs(
    tmp_path: Path, studio: LocalStudio, site: Path, server: FileServer
) -> None:
    """A server that does not answer holds up the answer to its offer for some seconds, and no heartbeat; then
    the job is taken as if nobody had asked.
    """
    with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
        running.await_message("STATUS=ready, connected", READY_S)
        files = serve(server, 0, unknown_family(), hold_head=True)
        job_id = queue_on_demand(studio, files)
        assert files[0].held.wait(READY_S)
        seen: set[float | None] = set()

        def have_beaten() -> bool:
            seen.update(worker.last_seen_at for worker in studio.workers())
            return len(seen) > 4

        await_that(have_beaten, "five heartbeats")
        assert studio.job(job_id).status == "offered"
        await_status(studio, job_id, "running")
        running.signal(signal.SIGTERM)
        await_log(running, "stop requested")
        running.signal(signal.SIGTERM)
        assert running.wait(READY_S) == 0
    assert "offer judged without its headers" in {line["message"] for line in running.log_lines()}
