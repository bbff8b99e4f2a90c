"""Full-size Stable Diffusion 1.5 on the CPU, each contender in its own process; ``make bench`` prints it.

Beside each other: the engine, the engine in the service (main thread, with the session's beside it), the
plain diffusers pipeline, and stable-diffusion.cpp where ``SD_CLI`` names its command. All have the same
checkpoint in the published layout, the same size, steps and words, torch's threads as each has them by
itself, and end with a PNG. They take turns by rounds, the order turned round each time, so that whatever else
the machine does meets all of them; on one that is busy the plain pipeline's threads, which wait by spinning,
lose most. Page faults and CPU time are printed too: they tell memory that comes and goes from a busy machine.
stable-diffusion.cpp is run once a job, as the upstream worker runs it, so that its time has the loading in
it; that of the others has not.

``python -m tests.bench.cpu --small`` runs it with the sample model, to see that it works.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from studio_worker import sample_model
from studio_worker.box import process

GOAL_PLAIN, GOAL_SD_CPP = 1.03, 3.0
GUIDANCE = 7.0
_LIMIT_S = 3600.0


class Work(NamedTuple):
    """What everybody makes."""

    checkpoint: str
    config: str
    size: int
    steps: int
    jobs: int

    def task(self, seed: int) -> dict[str, Any]:
        return {
            "prompt": words(seed),
            "seed": seed,
            "width": self.size,
            "height": self.size,
            "steps": self.steps,
            "cfgScale": GUIDANCE,
            "samplingMethod": "euler_a",
            "ext": "png",
        }


class Cost(NamedTuple):
    """What one job took: seconds on the clock and of the processors, and pages asked of the system."""

    clock_s: float
    cpu_s: float
    faults: int


def words(seed: int) -> str:
    """Other words for every seed."""
    return f"{sample_model.prompt('red', 'potion', 'grass')} {seed}"


# --- the contenders, each in a process of its own ---


def engine(work: Work) -> list[Cost]:
    """The engine, called by hand."""
    process.prepare()
    from studio_worker.engine import Request
    from studio_worker.engine.diffusion import DiffusionEngine
    from studio_worker.jobs import Cancel, ImageTask
    from studio_worker.models import CliDefaults, LocalFile

    made = DiffusionEngine("cpu")
    file = LocalFile("model", Path(work.checkpoint), work.checkpoint)

    def job(seed: int) -> None:
        task = ImageTask.model_validate(work.task(seed))
        made.generate(
            Request("bench", "bench", task, CliDefaults(), (file,)), lambda done, total: None, Cancel()
        )

    return costs(job, work.jobs)


def plain(work: Work) -> list[Cost]:
    """The library's pipeline, in a process as the library finds it."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline
    from torch import Generator

    pipeline = StableDiffusionPipeline.from_single_file(
        work.checkpoint, config=work.config, local_files_only=True, safety_checker=None
    )
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def job(seed: int) -> None:
        found = pipeline(
            words(seed),
            num_inference_steps=work.steps,
            guidance_scale=GUIDANCE,
            width=work.size,
            height=work.size,
            generator=Generator().manual_seed(seed),
        )
        found.images[0].save(io.BytesIO(), "PNG")

    return costs(job, work.jobs)


def service(work: Work) -> list[Cost]:
    """The service, from a studio's offer to the encoded picture; files are there, and uploads not counted."""
    from studio_worker.demo import write_configuration
    from studio_worker.demo.service_process import ServiceProcess
    from studio_worker.local_studio import LocalStudio
    from studio_worker.local_studio.rules import JobStatus

    checkpoint = Path(work.checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with LocalStudio(
            folder / "studio.sqlite3", models_dir=checkpoint.parent, auto_approve=True
        ) as studio:
            config = write_configuration(studio, folder)
            (config / "models.d" / "sample.json").unlink()
            url = f"{studio.base_url}/models/{checkpoint.name}"
            file = {"role": "model", "url": url, "filename": checkpoint.name}
            source = {"engine": "sd-cpp", "files": [file], "cliDefaults": {}}
            with ServiceProcess(config, folder / "log") as running:

                def job(seed: int) -> None:
                    task = {"kind": "image", **work.task(seed)}
                    job_id = studio.queue_job(model="bench", task=task, model_source=source)
                    ended = (JobStatus.DONE, JobStatus.FAILED)
                    studio.wait_for(lambda: studio.job(job_id).status in ended, _LIMIT_S)
                    result = studio.queue.result(job_id)
                    if result is None:
                        raise SystemExit(f"the service failed: {studio.job(job_id).reason}")
                    times.append(sum(result.generation_meta["times"].values()))

                times: list[float] = []
                found = costs(job, work.jobs, of=running.process.pid)
                running.stop()
    return [cost._replace(clock_s=took) for cost, took in zip(found, times[1:], strict=True)]


def sd_cpp(work: Work) -> list[Cost]:
    """stable-diffusion.cpp's command line, once a job."""
    with tempfile.TemporaryDirectory() as folder:

        def job(seed: int) -> None:
            command = [os.environ["SD_CLI"], "-M", "img_gen", "-m", work.checkpoint, "-p", words(seed)]
            command += ["-W", str(work.size), "-H", str(work.size), "--steps", str(work.steps)]
            command += ["--cfg-scale", str(GUIDANCE), "--sampling-method", "euler_a", "-s", str(seed)]
            command += ["-o", f"{folder}/picture.png"]
            subprocess.run(command, check=True, capture_output=True)

        return costs(job, work.jobs, of=resource.RUSAGE_CHILDREN)


CONTENDERS: Mapping[str, Callable[[Work], list[Cost]]] = {
    "plain": plain,
    "engine": engine,
    "service": service,
    "sd.cpp": sd_cpp,
}


def costs(job: Callable[[int], None], jobs: int, of: int = resource.RUSAGE_SELF) -> list[Cost]:
    """What ``jobs`` jobs took, after one that loads everything.

    Args:
        of: whose CPU time and page faults count, as for :func:`resource.getrusage`, or another process's id.
    """
    job(0)
    found = []
    for seed in range(1, jobs + 1):
        before, started = used(of), time.perf_counter()
        job(seed)
        took = time.perf_counter() - started
        after = used(of)
        found.append(Cost(took, after[0] - before[0], after[1] - before[1]))
    return found


def used(of: int) -> tuple[float, int]:
    """Seconds of the processors and minor page faults so far."""
    if of <= 0:
        usage = resource.getrusage(of)
        return usage.ru_utime + usage.ru_stime, usage.ru_minflt
    fields = Path(f"/proc/{of}/stat").read_text().rpartition(")")[2].split()  # from the third on, proc(5)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[7])


# --- the rounds ---


def checkpoint(folder: Path) -> tuple[str, str]:
    """A full-size checkpoint of random weights, in half precision as published ones are (2 GB)."""
    process.prepare()
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from studio_worker.engine.families.component import CONFIGS, read_json
    from studio_worker.gpu_check.tiny.stable_diffusion import sd1_checkpoint
    from studio_worker.gpu_check.tiny.weights import drawn, safetensors

    own = folder / "config"
    shutil.copytree(CONFIGS / "sd1", own)
    shutil.copy(sample_model.CONFIG_DIR / "model_index.json", own)  # of the same classes
    parts = {
        "unet": UNet2DConditionModel.from_config(read_json(own / "unet" / "config.json")),
        "vae": AutoencoderKL.from_config(read_json(own / "vae" / "config.json")),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**read_json(own / "text_encoder" / "config.json"))),
    }
    for seed, part in enumerate(parts.values()):
        drawn(part, seed)
    file = safetensors(folder / "sd15.safetensors", "model", sd1_checkpoint(parts), torch.float16)
    return str(file.path), str(own)


def alone(*command: str) -> Any:
    """What a process of this module prints last, as JSON."""
    words = [sys.executable, "-W", "ignore", "-m", "tests.bench.cpu", *command]
    offline = {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env={**os.environ, **offline}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(given: argparse.Namespace) -> None:
    """Run all rounds and print a row for each contender."""
    names = [name for name in CONTENDERS if name != "sd.cpp" or "SD_CLI" in os.environ]
    with tempfile.TemporaryDirectory() as folder:
        small = (str(sample_model.WEIGHTS), str(sample_model.CONFIG_DIR))
        path, config = small if given.small else alone("--checkpoint", folder)
        work = Work(path, config, 64 if given.small else given.size, given.steps, given.jobs)
        title = "sample model" if given.small else "full-size SD 1.5"
        print(f"{title} on the CPU, {work.size} px, {work.steps} steps, {os.cpu_count()} cores", flush=True)
        seen: dict[str, list[Cost]] = {name: [] for name in names}
        for turn in range(given.rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                found = [Cost(*each) for each in alone("--contender", name, json.dumps(work))]
                print(name, *(f"{cost.clock_s:.2f} s" for cost in found), file=sys.stderr, flush=True)
                seen[name] += found
    middle = {name: Cost(*map(statistics.median, zip(*costs, strict=True))) for name, costs in seen.items()}
    for name, cost in middle.items():
        show(name, cost, middle)


def show(name: str, cost: Cost, all_: Mapping[str, Cost]) -> None:
    beside = f"{cost.cpu_s:.2f} s of CPU, {cost.faults / 1e3:.0f} thousand page faults"
    if name in {"engine", "service"}:
        beside += f"; {cost.clock_s / all_['plain'].clock_s:.3f} x plain (goal: {GOAL_PLAIN})"
        if "sd.cpp" in all_:
            beside += (
                f"; {all_['sd.cpp'].clock_s / cost.clock_s:.1f} x as fast as sd.cpp (goal: {GOAL_SD_CPP:g})"
            )
    print(f"{name:10} {cost.clock_s:8.2f} s a job  {beside}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Full-size Stable Diffusion 1.5 on the CPU, side by side.")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=3, help="that are measured, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="with the sample model, in seconds")
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.checkpoint is not None:
        print(json.dumps(checkpoint(Path(options.checkpoint))))
    elif options.contender is not None:
        who, what = options.contender
        print(json.dumps(CONTENDERS[who](Work(*json.loads(what)))))
    else:
        main(options)
