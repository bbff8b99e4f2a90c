"""A machine with studio-worker installed, as an operator has it, and a studio that it works for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from studio_worker.demo import MODEL_ID, sample_source
from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import prompt
from tests.acceptance.machine import Machine

UNIT = "studio-worker.service"
SITE = "/etc/studio-worker/conf.d/50-site.toml"
STATE = "/var/lib/studio-worker"
SYNTHETIC = {"engine": "synthetic", "files": [], "cliDefaults": {"width": 64, "height": 64, "steps": 4}}
JOB_S = 120.0

LONG = {"kind": "image", "prompt": "a hidden castle", "width": 512, "height": 512, "steps": 150}
"""A minute of work for the sample model: a job to be interrupted in."""
SOME = {"kind": "image", "prompt": "a hidden castle", "width": 192, "height": 192, "steps": 40}
"""Some seconds of work."""


class Box:
    """Short names for what the checks do again and again."""

    def __init__(self, machine: Machine, studio: LocalStudio) -> None:
        self.machine = machine
        self.studio = studio

    # --- the operator's part ---

    def configure(self, *, require_sample: bool = False, **sections: dict[str, Any]) -> None:
        """Site values: this studio, the CPU, and what ``sections`` say."""
        values: dict[str, dict[str, Any]] = {
            "studio": {"api_base_url": self.studio.base_url},
            "worker": {"device": "cpu"},
        }
        for section, entries in sections.items():
            values.setdefault(section, {}).update(entries)
        lines = []
        for section, entries in values.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in entries.items()]
        self.machine.write(SITE, "\n".join(lines) + "\n")
        if require_sample:
            source = sample_source(self.studio)
            entry = source.model_dump(by_alias=True, exclude_none=True, mode="json")
            self.machine.write(
                f"/etc/studio-worker/models.d/{MODEL_ID}.json", json.dumps({"id": MODEL_ID, **entry})
            )

    def require(self, name: str, url: str, sha256: str) -> None:
        """One file of a test's server as a required model."""
        file = {"role": "model", "url": url, "filename": f"{name}.safetensors", "sha256": sha256}
        entry = {"id": name, "engine": "sd-cpp", "files": [file]}
        self.machine.write(f"/etc/studio-worker/models.d/{name}.json", json.dumps(entry))

    def drop_in(self, *lines: str, unit: str = UNIT) -> None:
        """What ``systemctl edit`` would write."""
        text = "\n".join(lines) + "\n"
        self.machine.write(f"/etc/systemd/system/{unit}.d/50-test.conf", text)
        self.machine.run("systemctl", "daemon-reload")

    def start(self, *, check: bool = True, limit_s: float = 120.0) -> bool:
        """``systemctl start``, which waits for READY; returns whether it succeeded."""
        done = self.machine.run("systemctl", "start", UNIT, check=False, limit_s=limit_s)
        if check and done.returncode != 0:
            raise AssertionError(f"{done.stderr}\n{self.tail()}")
        return done.returncode == 0

    def stop(self, limit_s: float = 300.0) -> None:
        self.machine.run("systemctl", "stop", UNIT, limit_s=limit_s)

    # --- what is seen of it ---

    def show(self, name: str) -> str:
        return self.machine.show(UNIT, name)

    @property
    def pid(self) -> int:
        """The main process, as the machine counts."""
        return int(self.show("MainPID"))

    def host_pid(self) -> int:
        """The main process, as this host counts."""
        (pid,) = self.machine.host_pids(UNIT)
        return pid

    def log_lines(self, *more: str) -> list[dict[str, Any]]:
        return self.machine.log_lines(UNIT, *more)

    def messages(self) -> list[str]:
        return [line["message"] for line in self.log_lines()]

    def tail(self) -> str:
        """The end of the unit's journal, for a failed check."""
        return self.machine.run("journalctl", f"--unit={UNIT}", "--no-pager", "--lines=30").stdout

    def keep_journal(self, path: Path) -> None:
        """The whole journal, and what the machine printed, as a file on the host."""
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = self.machine.run("journalctl", "--no-pager", check=False).stdout
        path.write_text(f"{journal}\n--- console ---\n{self.machine.console()}")

    def await_message(self, text: str, limit_s: float = 60.0) -> None:
        self.machine.await_that(
            f"{text!r} in the journal", lambda: any(text in m for m in self.messages()), limit_s
        )

    # --- jobs ---

    def queue_synthetic(self, **task: Any) -> str:
        """A job that needs no torch."""
        return self.studio.queue_job(
            model="placeholder",
            task={"kind": "image", "prompt": "a hidden castle", **task},
            model_source=SYNTHETIC,
        )

    def queue_picture(self, task: dict[str, Any] | None = None) -> str:
        """A job for the sample model and torch."""
        task = task or {"kind": "image", "prompt": prompt("red", "gem", "sky"), "ext": "png", "seed": 7}
        return self.studio.queue_job(model=MODEL_ID, task=task, model_source=sample_source(self.studio))

    def await_job(self, job_id: str, *statuses: str, limit_s: float = JOB_S) -> None:
        """Until the job has one of ``statuses``."""
        try:
            self.studio.wait_for(lambda: self.studio.job(job_id).status in statuses, limit_s)
        except TimeoutError:
            job = self.studio.job(job_id)
            raise AssertionError(
                f"job is {job.status}, not {statuses}: {job.reason}\n{self.tail()}"
            ) from None

    def await_in_engine(self, job_id: str) -> None:
        """Until the job is in hand and its model loaded: torch works on it."""
        self.await_job(job_id, "running")
        note = f"{STATE}/spool/job-in-hand.json"
        self.machine.await_that("the job is noted as in hand", lambda: self.machine.path(note).exists())

    def await_online(self) -> str:
        """The id of the one worker, once its session is open."""
        self.studio.wait_for(
            lambda: any(self.studio.is_online(w.worker_id) for w in self.studio.workers()), 60.0
        )
        return self.studio.workers()[0].worker_id

    def timed_start(self) -> float:
        """Seconds from ``systemctl start`` to READY."""
        began = time.monotonic()
        self.start()
        return time.monotonic() - began
