"""The engine beside the plain diffusers pipeline called in a loop; ``make bench`` prints it.

Both make the same pictures from the same weights and write them as PNG. They take turns, so that whatever
else the machine does meets both alike.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from studio_worker import sample_model
from studio_worker.engine import Request
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.stable_diffusion import SAMPLE, stable_diffusion
from studio_worker.jobs import Cancel, ImageTask
from studio_worker.models import CliDefaults, LocalFile
from tests import tiny_models

JOBS = 16
GPU_JOBS = 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = sample_model.prompt("red", "potion", "grass")


@dataclass(frozen=True)
class Peer:
    """One model in both hands."""

    name: str
    plain: StableDiffusionPipeline
    family: Family
    files: tuple[LocalFile, ...]
    size: int
    steps: int


def main() -> None:
    """Run everything and print each row as it is measured."""
    print(f"engine on {DEVICE}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        peers = (sample(), larger(Path(folder)))
        for peer in peers:
            for row in overhead(peer):
                show(row)
        show(switching(peers))
        if DEVICE == "cuda":
            show(gpu_share(peers[1]))
    show(first_picture())


def show(row: tuple[str, str, str]) -> None:
    what, measured, beside = row
    print(f"{what:48} {measured:>12}  {beside}", flush=True)


def sample() -> Peer:
    """The sample model."""
    plain = StableDiffusionPipeline.from_single_file(
        str(sample_model.WEIGHTS),
        config=str(sample_model.CONFIG_DIR),
        local_files_only=True,
        safety_checker=None,
    )
    file = LocalFile("model", sample_model.WEIGHTS, sample_model.SHA256)
    return Peer("sample model", plain, SAMPLE, (file,), 64, 24)


def larger(folder: Path) -> Peer:
    """A random model of Stable Diffusion's kind: 25 million parameters, in three files."""
    small = sample().plain
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=small.text_encoder.config.hidden_size,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=[32, 64, 64, 64],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
    )
    for seed, part in enumerate((unet, vae)):
        tiny_models.randomised(part, seed)
    parts = {"unet": unet, "text_encoder": small.text_encoder, "vae": vae}
    for name, part in parts.items():
        tiny_models.write_config(folder / name, part)
    for name in ("tokenizer", "scheduler"):
        (folder / name).symlink_to(sample_model.CONFIG_DIR / name)
    state = {f"text_model.{name}": value for name, value in small.text_encoder.state_dict().items()}
    files = (
        tiny_models.write_safetensors(folder / "unet.safetensors", unet.state_dict(), "diffusion-model"),
        tiny_models.write_safetensors(folder / "text.safetensors", state, "text-encoder"),
        tiny_models.write_safetensors(folder / "vae.safetensors", vae.state_dict(), "vae"),
    )
    plain = StableDiffusionPipeline(**{**small.components, **parts}, requires_safety_checker=False)
    return Peer("random model", plain, stable_diffusion("bench", folder), files, 128, 6)


def overhead(peer: Peer) -> list[tuple[str, str, str]]:
    """One job through the engine beside one call of the pipeline."""
    engine = DiffusionEngine(DEVICE, families=(peer.family,))
    plain = peer.plain
    if DEVICE == "cuda":
        plain.to(DEVICE, torch.float16)
    plain.scheduler = EulerAncestralDiscreteScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)

    def through_engine(seed: int) -> None:
        engine.generate(request(peer, seed), lambda done, total: None, Cancel())

    def through_pipeline(seed: int) -> None:
        made = plain(
            PROMPT,
            num_inference_steps=peer.steps,
            guidance_scale=4.0,
            width=peer.size,
            height=peer.size,
            generator=torch.Generator().manual_seed(seed),
        )
        made.images[0].save(io.BytesIO(), "PNG")

    first_s = seconds(lambda: through_engine(0))
    second_s = seconds(lambda: through_engine(0))
    through_pipeline(0)
    pairs = []
    for seed in range(JOBS):  # who goes first changes every time
        sides = (through_engine, through_pipeline)
        times = {side: seconds(partial(side, seed)) for side in (sides if seed % 2 else sides[::-1])}
        pairs.append((times[through_engine], times[through_pipeline]))
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(mine / plains for mine, plains in pairs)
    what = f"{peer.name}, {peer.size} px, {peer.steps} steps"
    return [
        (f"{what}: a job", f"{ours:.3f} s", f"plain pipeline {theirs:.3f} s; ratio {ratio:.3f}"),
        (f"{what}: first job", f"{first_s:.3f} s", f"second {second_s:.3f} s, later ones {ours:.3f} s"),
    ]


def switching(peers: tuple[Peer, ...]) -> tuple[str, str, str]:
    """Back to a model that is kept in memory, beside loading it from disk (in the page cache)."""
    peer = peers[1]
    engine = DiffusionEngine(DEVICE, families=tuple(p.family for p in peers))
    loads = []
    for each in (peer, peers[0], peer):
        made = engine.generate(request(each, 0), lambda done, total: None, Cancel())
        loads.append(made.timings_s["load"])
    kept = max(loads[2], 1e-6)
    times = f"{loads[0] / kept:.0f} times" if loads[2] else "nothing is read"
    return ("back to a model kept in memory", f"{loads[2]:.4f} s", f"from disk {loads[0]:.3f} s; {times}")


def gpu_share(peer: Peer) -> tuple[str, str, str]:
    """Pictures a second over 50 jobs, and the share of that time in which the GPU computed, by the driver."""
    engine = DiffusionEngine(DEVICE, families=(peer.family,))
    engine.generate(request(peer, 0), lambda done, total: None, Cancel())
    ask = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]
    with subprocess.Popen([*ask, "--id=0"], stdout=subprocess.PIPE, text=True) as watcher:
        took_s = seconds(
            lambda: [
                engine.generate(request(peer, seed), lambda done, total: None, Cancel())
                for seed in range(GPU_JOBS)
            ]
        )
        watcher.terminate()
        shares = [int(line) for line in watcher.communicate()[0].split()]
    share = f"GPU in use {statistics.mean(shares):.0f}% of the time (goal: 97%)"
    return (f"{GPU_JOBS} jobs of the {peer.name}", f"{GPU_JOBS / took_s:.2f} pictures a second", share)


def first_picture() -> tuple[str, str, str]:
    """From the start of a process to its first picture, beside the import of torch and diffusers alone."""
    run = [sys.executable, "-m", "studio_worker", "generate", PROMPT, "-o", "-", "--config", "/nonexistent"]
    imports = [sys.executable, "-c", "import torch, diffusers; diffusers.StableDiffusionPipeline"]
    ours, theirs = (
        statistics.median(
            seconds(lambda c=command: subprocess.run(c, check=True, capture_output=True)) for _ in range(3)
        )
        for command in (run, imports)
    )
    return ("start to first picture", f"{ours:.1f} s", f"import of torch and a pipeline {theirs:.1f} s")


def request(peer: Peer, seed: int) -> Request:
    return Request(
        job_id="bench",
        model=peer.name,
        task=ImageTask(prompt=PROMPT, seed=seed, steps=peer.steps, ext="png"),
        defaults=CliDefaults(cfg_scale=4.0, width=peer.size, height=peer.size),
        files=peer.files,
    )


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
