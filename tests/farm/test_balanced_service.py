"""The real service at a studio as docs/farm.md has it: PostgreSQL, S3, a load balancer with a certificate."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from studio_worker import sample_model
from studio_worker.demo import MODEL_ID, sample_source
from studio_worker.demo.service_process import ServiceProcess
from tests.fakes.servers import FileServer
from tests.farm.balanced import Desk, Site, balanced
from tests.farm.s3 import S3Server
from tests.lab.balancers import haproxy
from tests.lab.service import DONE_S, READY_S, await_status


@pytest.fixture
def farm(database_url: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with balanced(haproxy, database_url, f"s3://{bucket}/p", tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture
def studio(farm: Site) -> Desk:
    """Whose address, which is the balancer's, the service's configuration has."""
    return farm.desk


def test_picture_arrives_once_in_s3_though_its_studio_process_is_killed(
    farm: Site, site: Path, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    """kill -9 of the process behind the balancer that the worker talks to, in the middle of a job: the
    picture comes to the other process by https, and is one object in S3.
    """
    with FileServer() as server, ServiceProcess(site, tmp_path / "service.log") as service:
        service.await_message("READY=1", READY_S)
        weights = server.serve("/weights", sample_model.WEIGHTS.read_bytes(), hold_after=1000)
        source = sample_source(farm.desk)
        files = tuple(replace(file, url=weights.url) for file in source.files)
        job_id = farm.desk.queue_job(
            model=MODEL_ID,
            task={"kind": "image", "prompt": "a red potion", "seed": 1},
            model_source=source.model_copy(update={"files": files}),
        )
        assert weights.held.wait(DONE_S)
        farm.desk.wait_for(lambda: farm.desk.job(job_id).status == "running", DONE_S)
        killed = farm.holder()
        killed.send(signal.SIGKILL)
        asyncio.run(killed.ended())
        weights.release()
        await_status(farm.desk, job_id, "done", "failed")
        assert service.stop() == 0
    job = farm.desk.job(job_id)
    assert (job.status, job.attempts, job.completions, job.refused_uploads) == ("done", 1, 1, 0)
    (key,) = (key for key in s3_server.keys(bucket) if key != "p/studio")
    assert key.startswith(f"p/{job_id}-")
    assert farm.desk.result(job_id)
