"""kill -9 at random moments: what a power cut does to a box at work."""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
from pathlib import Path

from studio_worker import sample_model
from studio_worker.demo import MODEL_ID, sample_source, write_configuration
from studio_worker.demo.jobs import shown_jobs
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import Limits, LocalStudio
from studio_worker.local_studio.rules import JobStatus, QueuedJob
from tests.lab.service import hurried

KILLS = 10
SEED = 20


def is_over(job: QueuedJob) -> bool:
    """Whether the one worker has done with ``job``: what was in hand at two crashes it does not take."""
    return job.status in {JobStatus.DONE, JobStatus.FAILED} or bool(job.rejections)


def test_service_killed_at_ten_random_moments_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    """After ten kills every job of the demo is done exactly once or failed with a reason, no file damaged."""
    moments = random.Random(SEED)
    work = tmp_path / "work"
    work.mkdir()
    with LocalStudio(
        tmp_path / "studio.sqlite3",
        models_dir=sample_model.WEIGHTS.parent,
        auto_approve=True,
        limits=Limits(max_attempts=KILLS + 1),
    ) as studio:
        config = write_configuration(studio, work)
        environment = hurried(tmp_path, 0.1)  # or it would wait after the third process that died in a job
        source = sample_source(studio)
        ids = [
            studio.queue_job(
                model=MODEL_ID,
                task={"kind": "image", "prompt": shown.prompt, **shown.task},
                model_source=source,
            )
            for shown in shown_jobs("/files/none", "/files/none")
            if "initImageUrl" not in shown.task
        ]
        for _ in range(KILLS):
            with ServiceProcess(config, tmp_path / "service.log", environment) as service:
                # The moment itself is what is random, so here a plain wait is the point.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    service.process.wait(moments.uniform(0.2, 5.0))
                assert service.process.returncode is None, service.last_line()
                service.kill()
        with ServiceProcess(config, tmp_path / "service.log", environment) as service:
            service.await_message("READY=1", 60.0)
            studio.wait_for(lambda: all(is_over(studio.job(i)) for i in ids), 200.0)
            assert service.stop() == 0
        jobs = [studio.job(job_id) for job_id in ids]
        for job in jobs:
            assert job.completions == (1 if job.status is JobStatus.DONE else 0)
            assert job.status is JobStatus.DONE or job.reason or job.rejections
        done = [job for job in jobs if job.status is JobStatus.DONE]
        assert len(done) >= len(jobs) - 1 - KILLS // 2  # one must fail; two kills in one job end it
        assert all(studio.result(job.job_id) for job in done)
    for path in (work / "models").rglob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sample_model.SHA256
    assert not list((work / "state" / "outbox").glob("*.json"))
