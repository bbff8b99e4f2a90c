"""Jobs for the tests of what is kept on disk."""

from __future__ import annotations

from pathlib import Path

from studio_worker.jobs import ImageTask, Job
from studio_worker.models import ModelSource

HOSTILE_IDS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "",
    "a/b",
    "nul\0nul",
    "\n",
    "x" * 10_000,
    "\ud800",
    "…",
]


def job(job_id: str = "job-1", prompt: str = "a lighthouse") -> Job:
    task = ImageTask(prompt="").model_copy(update={"prompt": prompt})  # of any length
    return Job(job_id, "sample", task, ModelSource(engine="sdcpp"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
