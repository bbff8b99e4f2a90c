"""What tests of the running service share: its configuration, jobs for it, waits for what it does."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from studio_worker.studio.http import registration
from studio_worker.studio.session import connection, connector
from studio_worker.work import breaker
from tests.fakes.servers import ServedFile

READY_S = 60.0
DONE_S = 120.0
SYNTHETIC = {"engine": "synthetic", "files": [], "cliDefaults": {"width": 64, "height": 64, "steps": 4}}
LONG = {"kind": "image", "prompt": "a hidden castle", "width": 512, "height": 512, "steps": 150}
"""Tens of seconds of work for the sample model: a job to be interrupted in."""


def override(site: Path, toml: str) -> None:
    """Site values, as an operator would give them."""
    (site / "conf.d").mkdir(exist_ok=True)
    (site / "conf.d" / "50-test.toml").write_text(toml)


def require(site: Path, name: str, *files: ServedFile, sha256: str | None = None) -> None:
    """Make files from a test server a required model."""
    entry = {
        "id": name,
        "engine": "sd-cpp",
        "files": [
            {
                "role": "model",
                "url": file.url,
                "filename": file.url.rpartition("/")[2],
                "sha256": sha256 or hashlib.sha256(file.content).hexdigest(),
            }
            for file in files
        ],
    }
    (site / "models.d" / f"{name}.json").write_text(json.dumps(entry))


def queue_synthetic(studio: LocalStudio, **task: Any) -> str:
    return studio.queue_job(
        model="placeholder",
        task={"kind": "image", "prompt": "a hidden castle", **task},
        model_source=SYNTHETIC,
    )


def await_status(studio: LocalStudio, job_id: str, *statuses: str) -> None:
    studio.wait_for(lambda: studio.job(job_id).status in statuses, DONE_S)


def await_that(is_so: Callable[[], bool], what: str) -> None:
    """Until it is so; nobody tells of it, so it is looked for."""
    deadline = time.monotonic() + DONE_S
    while not is_so():
        assert time.monotonic() < deadline, f"not within {DONE_S} s: {what}"
        time.sleep(0.005)


def await_file(path: Path) -> None:
    """Until the service has written ``path``."""
    await_that(path.exists, f"{path} is written")


def await_log(running: ServiceProcess, message: str, times: int = 1) -> None:
    """Until the service has logged ``message`` so often."""

    def is_logged() -> bool:
        return sum(line["message"] == message for line in running.log_lines()) >= times

    await_that(is_logged, f"{message!r} is logged")


def await_online(studio: LocalStudio) -> str:
    """The id of the one worker, once its session is open."""
    studio.wait_for(lambda: any(studio.is_online(w.worker_id) for w in studio.workers()), READY_S)
    return studio.workers()[0].worker_id


def command(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of an operator beside the running service."""
    return subprocess.run(
        [sys.executable, "-m", "studio_worker", *words, "--config", str(site)],
        capture_output=True,
        text=True,
        timeout=READY_S,
    )


def status(site: Path) -> dict[str, Any]:
    done = command(site, "status", "--json")
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def hurried(folder: Path, pause_s: float) -> dict[str, str]:
    """An environment in which the service's first pause is shorter, and it is offered jobs and asks about its
    registration, more often.
    """
    (folder / "sitecustomize.py").write_text(
        "import functools\n"
        f"import {breaker.__name__} as rule\n"
        f"import {connection.__name__} as connection\n"
        f"import {connector.__name__} as connector\n"
        f"import {registration.__name__} as registration\n"
        f"rule.FIRST_PAUSE_S = {pause_s}\n"
        "connector.Timings = functools.partial(connection.Timings, heartbeat_s=0.2)\n"
        "registration.Registration.__init__.__kwdefaults__.update(tick_s=0.2)\n"
    )
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def reload(running: ServiceProcess) -> list[str]:
    """SIGHUP; returns what systemd heard from RELOADING=1 to the status after READY=1."""
    running.messages.clear()
    running.signal(signal.SIGHUP)
    running.await_message("READY=1", READY_S)
    return running.messages[running.messages.index("RELOADING=1") :]


def samples(text: str) -> dict[str, float]:
    """Every sample by its name with labels, as Prometheus reads them."""
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
