"""The engine beside the plain pipeline on a GPU, with random weights of SDXL's and of Z-Image's size.

``make bench`` prints it. Both work with the very same components in the GPU's memory, and as in
``tests.bench_engine`` with the same scheduler, steps, sizes, seeds and new words for every picture, a PNG at
the end of each. Without a GPU nothing is measured; a test runs the same functions with the sample model.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from studio_worker import process
from studio_worker.engine import Request
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.component import Part
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.sdxl import SDXL
from studio_worker.engine.families.z_image import Z_IMAGE
from studio_worker.engine.loading import empty_model, load_scheduler, load_tokenizer, weights_dtype
from studio_worker.jobs import Cancel, ImageTask
from studio_worker.models import CliDefaults, LocalFile
from tests.bench_engine import Row, png, seconds, show, spread, taking_turns, words

PAIRS = 10
JOBS = 50
SPARE_BYTES = 6 << 30
"""Beside the weights, for a picture of 1024 pixels a side."""

_PREFIXES = {"transformers.CLIPTextModel": "text_model.", "transformers.Qwen3Model": "model."}
"""What stands before the library's names in the files, by class."""

_NVIDIA_SMI = "nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits --loop-ms=200 --id=0"


@dataclass(frozen=True)
class Case:
    """A model to measure: its family, how a picture of it is made, and what the plain pipeline calls that."""

    family: Family
    side: int
    steps: int
    guidance: float
    called: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case(SDXL, side=1024, steps=20, guidance=7.0, called={"guidance_scale": 7.0}),
    Case(Z_IMAGE, side=1024, steps=8, guidance=1.0, called={"guidance_scale": 0.0}),
)


def main() -> None:
    """Measure every case that the GPU has room for; print each row as it is measured."""
    if not torch.cuda.is_available():
        print("bench on a GPU: skipped, torch finds no CUDA device here")
        return
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    print(f"engine on {torch.cuda.get_device_name(0)}")
    for case in CASES:
        needed_bytes = 2 * sum(numbers(part) for part in case.family.parts.values()) + SPARE_BYTES
        if needed_bytes > total_bytes:
            print(f"{case.family.name}: skipped, needs {needed_bytes / 2**30:.0f} GiB of the GPU's memory")
            continue
        with tempfile.TemporaryDirectory() as folder:
            files = write_random(case.family, Path(folder), weights_dtype(case.family, torch.device("cuda")))
            for row in measured(case, files, "cuda", PAIRS, JOBS):
                show(row)


def numbers(part: Part) -> int:
    """How many numbers a component's weights are."""
    return sum(tensor.numel() for tensor in empty_model(part).state_dict().values())


def published(part: Part) -> dict[str, torch.Tensor]:
    """A component's tensors, without memory, under the names that its files have."""
    prefix = _PREFIXES.get(part.cls, "")
    return {prefix + name: tensor for name, tensor in empty_model(part).state_dict().items()}


def write_random(family: Family, folder: Path, dtype: torch.dtype) -> tuple[LocalFile, ...]:
    """A file of random weights for every component; activations keep their size in such a model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    files = []
    for name, part in family.parts.items():
        path = folder / f"{name}.safetensors"
        state = {}
        for key, empty in published(part).items():
            noise = torch.randn(empty.shape, generator=generator, device=device, dtype=dtype)
            if "norm" in key and empty.ndim == 1 and key.endswith("weight"):
                state[key] = (1 + 0.1 * noise).cpu()
            else:
                state[key] = (noise * (0.8 / max(1, empty[0].numel()) ** 0.5)).cpu()
        save_file(state, path)
        files.append(LocalFile(part.role, path, str(path)))
    return tuple(files)


def measured(case: Case, files: tuple[LocalFile, ...], device: str, pairs: int, jobs: int) -> list[Row]:
    """Job by job beside the plain pipeline, then many in a row through each."""
    engine = DiffusionEngine(device, families=(case.family,))

    def through_engine(seed: int) -> bytes:
        request = Request(
            job_id="bench",
            model=case.family.name,
            task=ImageTask(prompt=words(seed), seed=seed, steps=case.steps, ext="png"),
            defaults=CliDefaults(
                cfg_scale=case.guidance, width=case.side, height=case.side, steps=case.steps
            ),
            files=files,
        )
        return engine.generate(request, lambda done, total: None, Cancel()).data

    first_s = seconds(lambda: through_engine(0))
    plain = plain_pipeline(engine, case)

    def through_pipeline(seed: int) -> bytes:
        made = plain(
            words(seed),
            num_inference_steps=case.steps,
            width=case.side,
            height=case.side,
            generator=torch.Generator().manual_seed(seed),
            **case.called,
        )
        return png(made.images[0])

    through_pipeline(0)
    ours, theirs, difference = taking_turns(through_engine, through_pipeline, range(1, pairs + 1))
    ratios = [mine / plains for mine, plains in zip(ours, theirs, strict=True)]
    ours_s, theirs_s = statistics.median(ours), statistics.median(theirs)
    what = f"{case.family.name}, random weights, {case.side} px, {case.steps} steps"
    beside = (
        f"plain pipeline {theirs_s:.3f} s; ratio {spread(ratios)} (goal: 1.03); pictures up to {difference} "
        f"levels apart; first job, loading included, {first_s:.1f} s"
    )
    rows = [(f"{what}: a job", f"{ours_s:.3f} s", beside)]
    for name, side in (("engine", through_engine), ("plain pipeline", through_pipeline)):
        with busy_shares(device) as shares:
            took_s = seconds(lambda side=side: [side(seed) for seed in range(jobs)])
        share = f"GPU in use {statistics.mean(shares):.1f}% of the time (goal: 97%)" if shares else ""
        rows.append((f"{what}: {jobs} jobs, {name}", f"{jobs / took_s:.2f} pictures/s", share))
    return [*rows, decoding(case, plain.vae, pairs)]


@torch.no_grad()
def decoding(case: Case, vae: Any, pairs: int) -> Row:
    """A VAE decoding with its filters' channels last, as the engine lays them out on a GPU, beside the order
    that the library has.
    """
    vae.to(torch.float32 if vae.dtype == torch.float16 else vae.dtype)  # as pictures are decoded
    side = case.side // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(1, vae.config.latent_channels, side, side).to(vae.device, vae.dtype)
    times: dict[torch.memory_format, list[float]] = {torch.channels_last: [], torch.contiguous_format: []}
    for index in range(1 + pairs):
        for order, seen in times.items():
            vae.to(memory_format=order)
            took_s = seconds(lambda: vae.decode(latents).sample.cpu())  # the copy waits for the GPU
            seen.extend([took_s] if index else [])  # the first chooses kernels
    last, first = times.values()
    ratios = [one / other for one, other in zip(last, first, strict=True)]
    what = f"{case.family.name}, {case.side} px: VAE decoding, channels last"
    beside = f"channels first {statistics.median(first):.3f} s; ratio {spread(ratios)}"
    return what, f"{statistics.median(last):.3f} s", beside


def plain_pipeline(engine: DiffusionEngine, case: Case) -> Any:
    """The library's own pipeline over the components that the engine holds."""
    family = case.family
    held = {
        f"{type(each.component).__module__.split('.')[0]}.{type(each.component).__name__}": each.component
        for each in engine._residency._held.values()
    }
    parts = {name: held[part.cls] for name, part in family.parts.items()}
    tokenizers = {name: load_tokenizer(each) for name, each in family.tokenizers.items()}
    components = family.assemble({**parts, **tokenizers, "scheduler": load_scheduler(family)})
    pipeline = getattr(diffusers, str(family.pipelines.text))(**components, **family.fixed)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def busy_shares(device: str) -> Iterator[list[int]]:
    """Filled at the end with percentages, five a second: how much of the time since the one before the GPU
    had something to compute, by its driver.
    """
    shares: list[int] = []
    if device == "cpu":
        yield shares
        return
    with subprocess.Popen(_NVIDIA_SMI.split(), stdout=subprocess.PIPE, text=True) as watcher:
        try:
            yield shares
        finally:
            watcher.terminate()
        shares += [int(line) for line in watcher.communicate()[0].split()]


if __name__ == "__main__":
    process.prepare()
    main()
