"""How much of the time the engine works behind a slow link, by the number of lanes. ``make bench``.

The studio is real and behind a relay; the "GPU" is the sample model at a size that takes about two seconds
on two quiet cores. Its pictures are smaller than a GPU's of that time, so each is made as long, with bytes
behind its end. Counted is from when all lanes are at work to the last picture that leaves the device, so that
neither the start nor the last uploads are in it. Beside it stands what the link itself allows: for one lane
making and sending one after the other, for more the slower of the two.

Beside that: what an upload takes and waits for other uploads, how long the device is idle between two
pictures (the median), and how many of them were encoded on the main thread, which has the device.

Each row is printed when it is measured. ``LANES=3`` measures that number alone, ``JOBS=8`` so many pictures.
``BEFORE=FOLDER`` measures one lane also with the sources there, of a version before lanes. Then, without a
studio: how often the model changes where two alternate, by the rule of work/order.py and first come, first
served.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from studio_worker import sample_model
from studio_worker.demo import MODEL_ID, sample_source, write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from studio_worker.work import turns as turns_module
from studio_worker.work.turns import Turns

JOBS = int(os.environ.get("JOBS", "24"))
LANES = tuple(map(int, os.environ.get("LANES", "1,2,3").split(",")))
BEFORE = os.environ.get("BEFORE")
LINKS = ((0.04, 20e6), (0.15, 5e6))
"""Seconds each way, bits a second upwards."""
PICTURE = {"kind": "image", "prompt": sample_model.prompt("red", "potion", "grass"), "width": 192,
           "height": 192, "steps": 14, "ext": "png"}  # fmt: skip
PICTURE_BYTES = 1_500_000
SPY = f"""
import dataclasses, logging, os, sys, threading, time
from PIL import Image
from studio_worker.spool.outbox import Outbox

log = logging.getLogger("bench")
save, add = Image.Image.save, Outbox.add

def noted(self, *args, **kwargs):
    log.info("encoding", extra={{"is_main": threading.current_thread() is threading.main_thread()}})
    time_engine()
    return save(self, *args, **kwargs)

def time_engine():
    # Not before: torch, imported too early, has threads that a signal ends.
    engine = sys.modules["studio_worker.engine.diffusion"].DiffusionEngine
    name = "make" if hasattr(engine, "make") else "generate"  # which encoded, too
    make = getattr(engine, name)
    if make.__name__ == "timed":
        return

    def timed(self, *args, **kwargs):
        began = time.monotonic()
        made = make(self, *args, **kwargs)
        log.info("at the device", extra={{"began": began, "ended": time.monotonic()}})
        return made

    setattr(engine, name, timed)

def padded(self, job, picture, *args, **kwargs):
    data = picture.data + os.urandom({PICTURE_BYTES} - len(picture.data))
    return add(self, job, dataclasses.replace(picture, data=data), *args, **kwargs)

Image.Image.save, Outbox.add = noted, padded
"""
"""Run in the service before anything else."""
ROW = "{:32} {:>9} {:>13} {:>16} {:>10} {:>8} {:>8} {:>9} {:>16}"


class Link(NamedTuple):
    """Seconds each way, bytes a second upwards."""

    delay_s: float
    bytes_s: float

    def __str__(self) -> str:
        return f"{self.delay_s * 1000:.0f} ms each way, {self.bytes_s * 8 / 1e6:.0f} Mbit/s up"


def main() -> None:
    """Measure and print."""
    say(ROW.format("link", "lanes", "engine works", "the link allows", "a picture", "upload", "waits",
                   "idle then", "encoded on main"))  # fmt: skip
    for delay_s, bits_s in LINKS:
        link = Link(delay_s, bits_s / 8)
        if BEFORE:
            say(ROW.format(str(link), "1, before", *measured(1, link, BEFORE)))
        for lanes in LANES:
            say(ROW.format(str(link), lanes, *measured(lanes, link)))
    for lanes in (2, 3):
        with_rule, without = switches(lanes), switches(lanes, has_rule=False)
        say(
            f"two models in turn on {lanes} lanes: {with_rule} switches in 100 jobs, "
            f"{without} where the first that comes is the first served"
        )


def say(line: str) -> None:
    print(line, flush=True)


def measured(lanes: int, link: Link, sources: str = "") -> tuple[str, ...]:
    """The engine's share of the time, and what makes it so."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        (folder / "sitecustomize.py").write_text(SPY)
        path = ":".join(filter(None, (name, sources, os.environ.get("PYTHONPATH", ""))))
        with (
            LocalStudio(
                folder / "studio.sqlite3", models_dir=sample_model.WEIGHTS.parent, auto_approve=True
            ) as studio,
            relayed(studio, link) as url,
        ):
            config = write_configuration(studio, folder / "work")
            (config / "conf.d").mkdir(exist_ok=True)
            worker = "" if sources else f"[worker]\nlanes = {lanes}\n"
            (config / "conf.d" / "50-bench.toml").write_text(
                f'[studio]\napi_base_url = "{url}"\n{worker}[log]\nlevel = "debug"\n'
            )
            with ServiceProcess(config, folder / "log", {"PYTHONPATH": path}) as service:
                work(studio, lanes)
                service.stop()
        return figures(service.log_lines(), lanes, link)


def work(studio: LocalStudio, lanes: int) -> None:
    """Have all jobs done."""
    studio.wait_for(lambda: sum(studio.is_online(w.worker_id) for w in studio.workers()) == lanes, 120.0)
    source = sample_source(studio)
    jobs = [
        studio.queue_job(model=MODEL_ID, task={**PICTURE, "seed": seed}, model_source=source)
        for seed in range(JOBS)
    ]
    studio.wait_for(lambda: all(studio.job(job_id).status == "done" for job_id in jobs), 1800.0)


def figures(lines: list[dict[str, Any]], lanes: int, link: Link) -> tuple[str, ...]:
    """The row of one measurement."""
    done = {line["job_id"]: line for line in lines if line["message"] == "job done"}
    turns = sorted(
        (line["began"], line["ended"], line["job_id"]) for line in lines if line["message"] == "at the device"
    )
    (_, began_at, _), *counted = turns[lanes - 1 :]
    made = [done[job_id] for _, _, job_id in counted]
    idle_s = [begin - end for (_, end, _), (begin, _, _) in pairwise(turns[lanes - 1 :])]
    engine_s = sum(line["load_ms"] + line["generate_ms"] for line in made) / 1000
    picture_s, sending_s = engine_s / len(made), PICTURE_BYTES / link.bytes_s
    allowed = picture_s / (picture_s + sending_s) if lanes == 1 else min(1.0, picture_s / sending_s)
    on_main = [line["is_main"] for line in lines if line["message"] == "encoding"]
    return (
        f"{100 * engine_s / (counted[-1][1] - began_at):.1f}%",
        f"{100 * allowed:.1f}%",
        f"{picture_s:.2f} s",
        f"{statistics.mean(line['upload_ms'] for line in made) / 1000:.2f} s",
        f"{statistics.mean(line.get('uplink_ms', 0) for line in made) / 1000:.2f} s",
        f"{1000 * statistics.median(idle_s):.0f} ms",
        f"{sum(on_main)} of {len(on_main)}",
    )


@contextlib.contextmanager
def relayed(studio: LocalStudio, link: Link) -> Iterator[str]:
    """The studio's address behind a link."""
    command = [sys.executable, "-m", "tests.lab.relay", *map(str, (studio.port, *link))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def switches(lanes: int, *, has_rule: bool = True, jobs: int = 100) -> int:
    """How often the model changes, where jobs of two models come in turn and all lanes are always at work."""
    coming = iter("ab" * (jobs // 2))
    taking = threading.Lock()
    loaded: set[str] = set()
    turns = Turns(lambda: loaded)

    def make(model: str) -> None:
        loaded.clear()
        loaded.add(model)
        at_device.wait(0.005)

    at_device = threading.Event()

    def lane() -> None:
        while True:
            with taking:
                model = next(coming, None)
            if model is None:
                return
            turns.ask(partial(make, model), model).result()
            at_device.wait(0.002)  # delivered

    threads = [threading.Thread(target=lane) for _ in range(lanes)]

    def end() -> None:
        for thread in threads:
            thread.join()
        turns.close()

    first_come = mock.patch.object(turns_module, "next_of", return_value=0)
    with contextlib.nullcontext() if has_rule else first_come:
        for thread in (*threads, threading.Thread(target=end)):
            thread.start()
        turns.serve()
    return turns.facts.switches


if __name__ == "__main__":
    main()
