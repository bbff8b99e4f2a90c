"""How much of the time the engine works behind a slow link, by the number of lanes. ``make bench``.

The studio is real and behind a relay; the "GPU" is the sample model at a size that takes about two seconds on
two cores. Its pictures are smaller than a GPU's of that time, so the link's rate is made smaller with them:
an upload takes as long as one of 1.5 MB does. Counted is from the end of the first picture at the device to
that of the last one, so that neither the start nor the last upload is in it. Beside it stands what the link
itself allows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from studio_worker import sample_model
from studio_worker.demo import MODEL_ID, sample_source, write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio

JOBS = int(os.environ.get("JOBS", "24"))
LINKS = ((0.04, 20e6), (0.15, 5e6))
"""Seconds each way, bits a second upwards."""
PICTURE = {"kind": "image", "prompt": sample_model.prompt("red", "potion", "grass"), "width": 192,
           "height": 192, "steps": 8, "ext": "png"}  # fmt: skip
PICTURE_BYTES = 42_000
"""About what such a picture has."""
MEANT_BYTES = 1.5e6


def main() -> None:
    """Measure and print."""
    table = Table("link", "lanes", "engine works", "a picture", "upload", "the link allows", title="lanes")
    for delay_s, bits_s in LINKS:
        for lanes in (1, 2, 3):
            with tempfile.TemporaryDirectory() as name:
                link = f"{delay_s * 1000:.0f} ms each way, {bits_s / 1e6:.0f} Mbit/s up"
                rate = bits_s / 8 * PICTURE_BYTES / MEANT_BYTES
                table.add_row(link, str(lanes), *measured(Path(name), lanes, delay_s, rate))
    Console().print(table)


def measured(folder: Path, lanes: int, delay_s: float, bytes_s: float) -> tuple[str, ...]:
    """The engine's share of the time, and what makes it so."""
    (folder / "work").mkdir()
    weights = sample_model.WEIGHTS
    with (
        LocalStudio(folder / "studio.sqlite3", models_dir=weights.parent, auto_approve=True) as studio,
        relayed(studio, delay_s, bytes_s) as url,
    ):
        config = write_configuration(studio, folder / "work")
        (config / "conf.d").mkdir(exist_ok=True)
        (config / "conf.d" / "50-bench.toml").write_text(
            f'[studio]\napi_base_url = "{url}"\n[worker]\nlanes = {lanes}\n[log]\nlevel = "debug"\n'
        )
        with ServiceProcess(config, folder / "log") as service:
            studio.wait_for(
                lambda: sum(studio.is_online(w.worker_id) for w in studio.workers()) == lanes, 120.0
            )
            jobs = [
                studio.queue_job(
                    model=MODEL_ID, task={**PICTURE, "seed": seed}, model_source=sample_source(studio)
                )
                for seed in range(JOBS)
            ]
            studio.wait_for(lambda: all(studio.job(job_id).status == "done" for job_id in jobs), 1800.0)
            service.stop()
        size_bytes = sum(len(studio.result(job_id)) for job_id in jobs) / JOBS
    return figures(service.log_lines(), size_bytes, bytes_s)


def figures(lines: list[dict[str, Any]], size_bytes: float, bytes_s: float) -> tuple[str, ...]:
    """The row of one measurement."""
    done = {line["job_id"]: line for line in lines if line["message"] == "job done"}
    left_device = sorted(
        (datetime.fromisoformat(line["timestamp"]).timestamp() - done[line["job_id"]]["encode_ms"] / 1000,
         done[line["job_id"]])
        for line in lines if line["message"] == "picture made" and line["job_id"] in done
    )  # fmt: skip
    (first_at, _), *others = left_device
    engine_s = sum(line["load_ms"] + line["generate_ms"] for _, line in others) / 1000
    share = engine_s / (others[-1][0] - first_at)
    picture_s = engine_s / len(others)
    upload_s = sum(line["upload_ms"] for line in done.values()) / len(done) / 1000
    return (
        f"{100 * share:.1f}%",
        f"{picture_s:.2f} s, {size_bytes / 1e6:.1f} MB",
        f"{upload_s:.2f} s",
        f"{100 * min(1.0, picture_s / (size_bytes / bytes_s)):.0f}%",
    )


@contextlib.contextmanager
def relayed(studio: LocalStudio, delay_s: float, bytes_s: float) -> Iterator[str]:
    """The studio's address behind a link."""
    port = studio.base_url.rpartition(":")[2].strip("/")
    command = [sys.executable, "-m", "tests.lab.relay", port, str(delay_s), str(bytes_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
