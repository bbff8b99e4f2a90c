"""The whole service on the device: doctor, READY, jobs of a studio, a clean end; and what it is made of."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from studio_worker import sample_model
from studio_worker.demo import MODEL_ID, sample_source, write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.errors import DeviceError
from studio_worker.gpu_check.rows import Missed
from studio_worker.gpu_check.subjects.lab import Lab
from studio_worker.local_studio import LocalStudio
from studio_worker.local_studio.rules import JobStatus

LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "gguf",
    "numpy",
    "PIL",
)

_READY_LIMIT_S = 100.0
_JOBS_LIMIT_S = 100.0
_STOP_LIMIT_S = 15.0
_JOBS = 6


def libraries(lab: Lab) -> None:
    """Which libraries there are. Imported here, they come from memory later."""
    for name in LIBRARIES:
        module = importlib.import_module(name)
        lab.note(**{name: str(getattr(module, "__version__", "without a version"))})


def absent(lab: Lab) -> None:  # noqa: ARG001
    """A GPU that this box does not have is an error, and never another device."""
    try:
        DiffusionEngine("cuda:99")
    except DeviceError:
        return
    raise Missed("there is an engine on cuda:99")


@contextmanager
def _studio(lab: Lab) -> Iterator[tuple[LocalStudio, Path, Path]]:
    """A studio that lets everybody in, a folder, and the configuration of a service of it."""
    models = sample_model.WEIGHTS.parent
    with (
        tempfile.TemporaryDirectory(dir=lab.folder) as folder,
        LocalStudio(Path(folder) / "studio.sqlite3", models_dir=models, auto_approve=True) as studio,
    ):
        work = Path(folder) / "work"
        work.mkdir()
        yield studio, work, write_configuration(studio, work)


def _on(lab: Lab) -> dict[str, str]:
    """The environment in which a service uses the device."""
    return {"STUDIO_WORKER_WORKER__DEVICE": lab.device}


def doctor(lab: Lab) -> None:
    """doctor finds nothing wrong with the box."""
    with _studio(lab) as (_, _, config):
        done = subprocess.run(
            [sys.executable, "-m", "studio_worker", "doctor", "--config", str(config), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_on(lab)},
        )
    findings = json.loads(done.stdout)["findings"]
    for level in ("ok", "warning", "failure"):
        lab.note(**{level: sum(each["level"] == level for each in findings)})
    lab.note(findings=[f"{each['level']} {each['check']}: {each['text']}" for each in findings])
    wrong = [f"{each['check']}: {each['text']}" for each in findings if each["level"] == "failure"]
    if wrong:
        raise Missed("; ".join(wrong))


def service(lab: Lab) -> None:
    """READY, jobs of a studio with the sample model, one seed one picture, SIGTERM and exit status 0."""
    with _studio(lab) as (studio, work, config):
        began = time.monotonic()
        with ServiceProcess(config, work / "service.log", _on(lab)) as service:
            service.await_message("READY=1", _READY_LIMIT_S)
            lab.note(ready_s=time.monotonic() - began)
            source = sample_source(studio)
            jobs = []
            for number in range(_JOBS):
                seed = max(1, number)  # the first two are a pair
                prompt = sample_model.prompt("red", "potion", "grass")
                task = {"kind": "image", "prompt": prompt, "seed": seed, "ext": "png"}
                jobs.append(
                    studio.queue_job(model=MODEL_ID, task=task, model_source=source, asset_name=str(number))
                )
            began = time.monotonic()
            ends = {JobStatus.DONE, JobStatus.FAILED}
            studio.wait_for(lambda: all(studio.job(job).status in ends for job in jobs), _JOBS_LIMIT_S)
            lab.note(jobs=len(jobs), jobs_s=time.monotonic() - began)
            failed = [studio.job(job).reason for job in jobs if studio.job(job).status is JobStatus.FAILED]
            if failed:
                raise Missed(f"{len(failed)} of {len(jobs)} jobs failed: {failed[0]}; {service.last_line()}")
            if studio.result(jobs[0]) != studio.result(jobs[1]):
                raise Missed("the same seed made two pictures")
            began = time.monotonic()
            status = service.stop(_STOP_LIMIT_S)
            lab.note(stop_s=time.monotonic() - began)
            if status != 0:
                raise Missed(f"at SIGTERM it ended with exit status {status}; {service.last_line()}")
