"""From one model of full size to another: back from RAM, and from the disk."""

from __future__ import annotations

import os
from pathlib import Path

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.gpu_check.places import is_on_disk
from studio_worker.gpu_check.subjects.bench import Bench
from studio_worker.gpu_check.subjects.estimates import GIB, Room
from studio_worker.gpu_check.subjects.lab import Lab

GOAL_TIMES = 3.0


def switch(lab: Lab) -> None:
    """Two models in turn where only one has room on the device, and each from its files."""
    lab.forget("bench")
    models = [Bench(lab, name) for name in ("z-image", "sdxl")]
    sizes = [sum(file.path.stat().st_size for file in model.files) for model in models]
    families = tuple(model.case.family for model in models)
    # A CPU has no second place to wait in, unless it is told so.
    memory = Room(64 * GIB) if lab.small else None
    engine = DiffusionEngine(lab.device, budget_bytes=max(sizes), families=families, memory=memory)
    for model in (*models, models[0]):
        model.job(0, engine, steps=2)
    from_ram = {model.name: _load_s(model, engine) for model in (models[1], models[0])}
    del engine
    lab.tidy()
    from_disk = {}
    for model in models:
        came_from = _forget_pages(model, lab)
        from_disk[model.name] = _load_s(model, model.new_engine())
        lab.tidy()
    for name, ram_s in from_ram.items():
        lab.note(**{f"{name}_ram_s": ram_s, f"{name}_disk_s": from_disk[name]})
    lab.note(read_from=came_from)
    times = min(from_disk[name] / max(ram_s, 1e-6) for name, ram_s in from_ram.items())
    lab.goal("times_faster", times, least=GOAL_TIMES)


def _load_s(model: Bench, engine: DiffusionEngine) -> float:
    return model.job(1, engine, steps=2).timings_s["load"]


def _forget_pages(model: Bench, lab: Lab) -> str:
    """Have the system forget what it holds of the model's files; says where they are read from now."""
    if not is_on_disk(lab.folder):
        return "memory: the files are on no disk"
    for file in model.files:
        _forget(file.path)
    return "disk"


def _forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not on disk yet cannot be forgotten
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
