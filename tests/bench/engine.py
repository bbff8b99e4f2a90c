"""The engine beside the plain diffusers pipeline called in a loop; ``make bench`` prints it.

Like with like: the same weights as the same number type on the same device, torch's fused attention, the same
scheduler, steps, size and seed, new words for every picture (so that prompts the engine has kept are of no
use to it), and a PNG at the end of each. They take turns job by job in one process, so that whatever else the
machine does meets both alike; whether they made the same pictures is printed too.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from studio_worker import sample_model
from studio_worker.box import process
from studio_worker.engine import Request
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.stable_diffusion import SAMPLE, stable_diffusion
from studio_worker.gpu_check.tiny.weights import config, config_of, drawn, prefixed, safetensors
from studio_worker.jobs import Cancel, ImageTask, Picture
from studio_worker.models import CliDefaults, FileRole, LocalFile
from tests.lab.stock import sample_pipeline

JOBS = 24
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
SMALL_WIDTHS = (64, 128, 256)
LARGE_WIDTHS = (320, 640, 1280)

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Model:
    """A model, and how a picture of it is made: pixels a side, steps."""

    name: str
    family: Family
    files: tuple[LocalFile, ...]
    size: int
    steps: int


@dataclass(frozen=True)
class Peer:
    """One model in both hands."""

    model: Model
    plain: StableDiffusionPipeline


SAMPLE_MODEL = Model(
    "sample model", SAMPLE, (LocalFile("model", sample_model.WEIGHTS, sample_model.SHA256),), 64, 24
)


def main() -> None:
    """Run everything and print each row as it is measured."""
    print(f"engine on {device()}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for peer in (sample(), random_model(Path(folder))):
            show(overhead(peer))
    with tempfile.TemporaryDirectory() as folder:
        for row in switching(large(Path(folder)).model, SAMPLE_MODEL):
            show(row)
    show(first_picture())


def device() -> str:
    """What there is. Asked for only where something is measured: who has asked cannot be forked."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def show(row: Row) -> None:
    what, measured, beside = row
    print(f"{what:48} {measured:>12}  {beside}", flush=True)


def sample() -> Peer:
    """The sample model."""
    return Peer(SAMPLE_MODEL, sample_pipeline())


def random_model(folder: Path) -> Peer:
    """A random model of Stable Diffusion's kind: 25 million parameters, in three files."""
    return _random(folder, SMALL_WIDTHS, torch.float32)


def large(folder: Path) -> Peer:
    """One of 595 million parameters in half precision, for measuring how it is loaded."""
    return _random(folder, LARGE_WIDTHS, torch.float16)


def _random(folder: Path, widths: tuple[int, ...], dtype: torch.dtype) -> Peer:
    small = sample().plain
    unet = UNet2DConditionModel(
        block_out_channels=widths,
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
        drawn(part, seed)
    parts = {"unet": unet, "text_encoder": small.text_encoder, "vae": vae}
    for name, part in parts.items():
        config(folder / name, config_of(part))
    for name in ("tokenizer", "scheduler"):
        (folder / name).symlink_to(sample_model.CONFIG_DIR / name)
    states = (
        unet.state_dict(),
        prefixed(small.text_encoder.state_dict(), "text_model."),
        vae.state_dict(),
    )
    model = written(folder)
    for file, state in zip(model.files, states, strict=True):
        safetensors(file.path, file.role, state, dtype)
    plain = StableDiffusionPipeline(**{**small.components, **parts}, requires_safety_checker=False)
    return Peer(model, plain)


def written(folder: Path) -> Model:
    """The random model whose files are, or will be, in ``folder``."""
    roles: tuple[FileRole, ...] = ("diffusion-model", "text-encoder", "vae")
    files = tuple(LocalFile(role, path := folder / f"{role}.safetensors", str(path)) for role in roles)
    return Model("random model", stable_diffusion("bench", folder), files, 128, 6)


def overhead(peer: Peer, jobs: int = JOBS) -> Row:
    """One job through the engine beside one call of the pipeline."""
    model, plain = peer.model, peer.plain
    engine = DiffusionEngine(device(), families=(model.family,))
    if device() == "cuda":
        plain.to(device(), torch.float16)
    plain.scheduler = EulerAncestralDiscreteScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)

    def through_engine(seed: int) -> bytes:
        return made(engine, model, seed).data

    def through_pipeline(seed: int) -> bytes:
        found = plain(
            words(seed),
            num_inference_steps=model.steps,
            guidance_scale=4.0,
            width=model.size,
            height=model.size,
            generator=torch.Generator().manual_seed(seed),
        )
        return png(found.images[0])

    for seed in range(2):
        through_engine(seed)
        through_pipeline(seed)
    ours, theirs, difference = taking_turns(through_engine, through_pipeline, range(jobs))
    ratios = [mine / plains for mine, plains in zip(ours, theirs, strict=True)]
    what = f"{model.name}, {model.size} px, {model.steps} steps: a job"
    same = "same pictures" if difference == 0 else f"pictures up to {difference} levels apart"
    beside = f"plain pipeline {statistics.median(theirs):.3f} s; ratio {spread(ratios)} (goal: 1.03); {same}"
    return what, f"{statistics.median(ours):.3f} s", beside


def taking_turns(
    one: Callable[[int], bytes], other: Callable[[int], bytes], seeds: Iterable[int]
) -> tuple[list[float], list[float], int]:
    """Seconds of each side for each seed, and by how many levels their pictures differ at most."""
    sides = (one, other)
    times: tuple[list[float], list[float]] = ([], [])
    difference = 0
    for seed in seeds:  # who goes first changes every time
        pictures = []
        for index in (0, 1) if seed % 2 else (1, 0):
            started = time.perf_counter()
            pictures.append(sides[index](seed))
            times[index].append(time.perf_counter() - started)
        difference = max(difference, levels_apart(*pictures))
    return *times, difference


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def switching(model: Model, other: Model) -> list[Row]:
    """Back to a model that is kept in RAM, beside loading it from disk.

    On a CPU what is kept is where it works, so that nothing is moved. The row then shows the copying of all
    its weights into other memory: what a move to a device has to do at least.
    """

    def load_s(engine: DiffusionEngine, each: Model) -> float:
        return made(engine, each, 0, steps=1, size=64).timings_s["load"]

    families = (model.family, other.family)
    size_bytes = sum(file.path.stat().st_size for file in model.files)
    load_s(DiffusionEngine(device(), families=families), model)  # what is done once in a process
    engine = DiffusionEngine(device(), families=families)
    cached_s = load_s(engine, model)
    disk = []
    while len(disk) < 3 and drop_caches():
        engine = DiffusionEngine(device(), families=families)
        disk.append(load_s(engine, model))
    disk_s = statistics.median(disk or [cached_s])
    how = "copied into other memory (on a CPU it is used where it is)"
    if device() == "cpu":
        kept = [t for held in engine._residency._held.values() for t in held.component.state_dict().values()]
        elsewhere = [tensor.clone() for tensor in kept]  # a device's memory is there, too, before it is used
        kept_s = statistics.median(seconds(partial(_copy, kept, elsewhere)) for _ in range(3))
    else:
        how = "moved to the device"
        engine = DiffusionEngine(device(), budget_bytes=size_bytes, families=families)
        kept_s = [load_s(engine, each) for each in (model, other, model)][-1]
    gigabytes = f"{size_bytes / 1e9:.1f} GB"
    source = "from the disk" if disk else "from the page cache (not root: it cannot be dropped)"
    return [
        (f"a model of {gigabytes} kept in RAM", f"{kept_s:.3f} s", how),
        (
            f"the same {source}",
            f"{disk_s:.3f} s",
            f"{disk_s / kept_s:.1f} x (goal: 5 x); from the page cache {cached_s:.3f} s",
        ),
    ]


def _copy(tensors: list[torch.Tensor], to: list[torch.Tensor]) -> None:
    for source, target in zip(tensors, to, strict=True):
        target.copy_(source)


def drop_caches() -> bool:
    """Whether files must now be read from the disk again: only root can have that (proc_sys_vm(5))."""
    subprocess.run(["sync"], check=True)
    try:
        DROP_CACHES.write_text("1")
    except OSError:
        return False
    return True


def first_picture() -> Row:
    """From the start of a process to its first picture, beside the import of torch and diffusers alone."""
    run = [sys.executable, "-m", "studio_worker", "generate", words(0), "-o", "-", "--config", "/nonexistent"]
    imports = [sys.executable, "-c", "import torch, diffusers; diffusers.StableDiffusionPipeline"]
    ours, theirs = (
        statistics.median(
            seconds(lambda c=command: subprocess.run(c, check=True, capture_output=True)) for _ in range(3)
        )
        for command in (run, imports)
    )
    return ("start to first picture", f"{ours:.1f} s", f"import of torch and a pipeline {theirs:.1f} s")


def words(seed: int) -> str:
    """Other words for every seed."""
    return f"{sample_model.prompt('red', 'potion', 'grass')} {seed}"


def made(
    engine: DiffusionEngine, model: Model, seed: int, *, steps: int | None = None, size: int | None = None
) -> Picture:
    size = size or model.size
    request = Request(
        job_id="bench",
        model=model.name,
        task=ImageTask(prompt=words(seed), seed=seed, steps=steps or model.steps, ext="png"),
        defaults=CliDefaults(cfg_scale=4.0, width=size, height=size),
        files=model.files,
    )
    return engine.generate(request, lambda done, total: None, Cancel())


def levels_apart(one: bytes, other: bytes) -> int:
    """The largest difference of two pictures, of 255 levels."""
    a, b = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int) for data in (one, other))
    return int(np.abs(a - b).max())


def spread(numbers: list[float]) -> str:
    """The median, with what the middle half is between."""
    low, middle, high = statistics.quantiles(numbers, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    process.prepare()
    main()
