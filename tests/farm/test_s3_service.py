"""The real service at a studio whose pictures lie in S3 storage."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio, Places, pictures_at
from tests.farm.s3_proxy import S3Proxy
from tests.lab.service import READY_S, await_log, await_status, override, queue_synthetic, status


@pytest.fixture
def inputs() -> str:
    """What the place of the pictures says of them."""
    return ""


@pytest.fixture
def studio(tmp_path: Path, bucket: str, proxy: S3Proxy, inputs: str) -> Iterator[LocalStudio]:
    places = Places(tmp_path / "studio.sqlite3", pictures_at(f"s3://{bucket}/p{inputs}"))
    with LocalStudio(places, auto_approve=True) as running:
        yield running


def red() -> bytes:
    drawn = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(drawn, "PNG")
    return drawn.getvalue()


def test_service_keeps_its_picture_until_the_storage_is_back(
    site: Path, studio: LocalStudio, proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that is finished while S3 refuses waits in the outbox and arrives once, in one try."""
    monkeypatch.setattr("studio_worker.local_studio.web.app.AWAY_RETRY_S", 1)
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        proxy.faults.refused = 1.0
        job_id = queue_synthetic(studio, ext="png")
        await_log(running, "delivery has to wait")
        assert studio.job(job_id).status == "running"
        assert status(site)["outbox"]["count"] == 1
        proxy.faults.refused = 0.0
        await_status(studio, job_id, "done")
        assert running.stop() == 0
    assert studio.result(job_id).startswith(b"\x89PNG")
    job = studio.job(job_id)
    assert (job.completions, job.attempts, job.refused_uploads) == (1, 1, 0)


@pytest.mark.parametrize(
    ("inputs", "from_s3"), [("", 0), ("?inputs=presigned", 1)], ids=["studio", "presigned"]
)
def test_service_gets_its_inputs(
    site: Path, studio: LocalStudio, proxy: S3Proxy, tmp_path: Path, inputs: str, from_s3: int
) -> None:
    """A worker as it is installed gets an input of a private storage through the studio; where the studio is
    told to, and the worker allowed, it comes from S3 itself.
    """
    if from_s3:
        override(site, "[models]\nallow_insecure_urls = true\n")
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        job_id = queue_synthetic(studio, ext="png", initImageUrl=studio.add_picture(red()))
        await_status(studio, job_id, "done", "failed")
        assert running.stop() == 0
    assert studio.job(job_id).status == "done", studio.job(job_id).reason
    assert proxy.counts["presigned"] == from_s3
    assert "X-Amz" not in (tmp_path / "log").read_text()
