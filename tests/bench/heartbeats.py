"""Heartbeats while everything else happens: models of several GB arrive, are loaded and run on every core.

Three models in the shape of Stable Diffusion 1.x with random weights, more than memory keeps at once, so that
jobs that ask for them in turn make the worker load one again and again. Measured where it counts: at the
studio, between the arrival of one heartbeat and the next.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import struct
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from studio_worker.demo import write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.gpu_check.tiny import compvis
from studio_worker.local_studio import LocalStudio
from studio_worker.models import CliDefaults, ModelFile, ModelSource
from tests.lab.weightless import sd1_parts

MODELS = 3
LIMIT_S = 7.0
"""The interval is 5 s; this is what an appliance may add to it."""


def main() -> None:
    """Run and print; ``--minutes`` says for how long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="for about 15 GB of models; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        Console().print(measure(Path(name), given.minutes * 60))


def measure(folder: Path, seconds: float) -> Table:
    """Keep a worker busy for ``seconds``; a table of the gaps between its heartbeats."""
    models = folder / "models"
    models.mkdir()
    files = [write_model(models / f"model-{seed}.safetensors", seed) for seed in range(MODELS)]
    work = folder / "work"
    work.mkdir()
    arrivals: list[float] = []
    sessions: set[int] = set()
    ended = threading.Event()
    with LocalStudio(folder / "studio.sqlite3", models_dir=models, auto_approve=True) as studio:
        config = write_configuration(studio, work)
        (config / "models.d" / "sample.json").unlink()
        sources = [
            ModelSource(
                engine="sd-cpp",
                files=(
                    ModelFile(
                        role="model",
                        url=f"{studio.base_url}/models/{path.name}",
                        filename=path.name,
                        sha256=sha,
                    ),
                ),
                cli_defaults=CliDefaults(cfg_scale=7.0, steps=8, width=256, height=256),
            )
            for path, sha in files
        ]
        with ServiceProcess(config, folder / "service.log") as service:
            studio.wait_for(lambda: any(studio.is_online(w.worker_id) for w in studio.workers()), 60.0)
            worker_id = studio.workers()[0].worker_id

            def watch() -> None:
                while not ended.wait(0.02):
                    seat = studio.presence.connected().get(worker_id)
                    if seat is not None and seat.heartbeat_at not in arrivals[-1:]:
                        arrivals.append(seat.heartbeat_at)
                        sessions.add(id(studio.attendance.live.get(worker_id)))

            watcher = threading.Thread(target=watch)
            watcher.start()
            began = time.monotonic()
            ids = []
            for source in itertools.cycle(sources):
                ids.append(
                    studio.queue_job(
                        model=source.files[0].filename,
                        task={"kind": "image", "prompt": "a red potion"},
                        model_source=source,
                        vram_gb_estimate=0.0,
                    )
                )
                left_s = seconds - (time.monotonic() - began)
                if left_s <= 0:
                    break
                # One job waits beside the one in hand, so that the worker never idles.
                waiting = ids[:-1]
                studio.wait_for(lambda: all(studio.job(i).status != "queued" for i in waiting), 900.0)  # noqa: B023
            ended.set()
            watcher.join()
            service.kill()
        lines = service.log_lines()
        jobs = [studio.job(job_id) for job_id in ids]
    gaps = sorted(b - a for a, b in itertools.pairwise(arrivals))
    loads = [line for line in lines if line["message"] == "model loaded"]
    failed = [job.reason for job in jobs if job.status == "failed"]
    table = Table(title=f"heartbeats over {seconds / 60:.0f} min", show_header=False)
    for what, text in (
        (
            "longest gaps",
            ", ".join(f"{gap:.2f} s" for gap in gaps[-3:][::-1]) + f"; goal: under {LIMIT_S:g} s",
        ),
        ("median of all", f"{gaps[len(gaps) // 2]:.2f} s of {len(gaps)}"),
        ("sessions", str(len(sessions))),
        ("models", f"{MODELS} of {files[0][0].stat().st_size / 1e9:.1f} GB, loaded {len(loads)} times"),
        ("jobs", f"{sum(job.status == 'done' for job in jobs)} done, {len(failed)} failed {failed[:1]}"),
    ):
        table.add_row(what, text)
    return table


def write_model(path: Path, seed: int) -> tuple[Path, str]:
    """A Stable Diffusion 1.x checkpoint of random half-precision weights, and its sha256."""
    with torch.device("meta"):
        unet, vae, text_encoder = (part.state_dict() for part in sd1_parts())
    state = compvis.single_file(unet, vae, text_encoder, vae_levels=4)
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    block = (torch.randn(16 << 20, generator=torch.Generator().manual_seed(seed)) * 0.02).half()
    content = memoryview(block.numpy().tobytes())
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(text)), text):
            file.write(piece)
            digest.update(piece)
        left = end
        while left:
            part = content[: min(left, len(content))]
            file.write(part)
            digest.update(part)
            left -= len(part)
    return path, digest.hexdigest()


if __name__ == "__main__":
    main()
