"""Many jobs in one process: does its memory grow? ``make soak`` prints it.

Three models, three sizes and LoRAs take turns, within a budget that has room for two of the models, so that
loading, unloading, adapters, schedulers and caches are all at work all the time.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from studio_worker import sample_model
from studio_worker.box import process
from studio_worker.engine import Inputs, Request
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.jobs import Cancel, ImageTask
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import encoded, scene

JOBS = 300
WARM_UP = 60
"""Until every kind of job has come several times, and allocators and caches have their size."""


def main() -> None:
    """Make the jobs, print a table, exit with 1 where memory grows by 0.1 MiB a job or more."""
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else JOBS
    with tempfile.TemporaryDirectory() as folder:
        rss = measure(jobs, Path(folder))
    after = np.arange(min(WARM_UP, jobs // 2), jobs)
    slope = float(np.polyfit(after, np.array(rss)[after], 1)[0])
    table = Table("job", "RSS (MiB)", title=f"{jobs} jobs: three models, three sizes, LoRAs in turn")
    for at in [*range(0, jobs, max(1, jobs // 10)), jobs - 1]:
        table.add_row(str(at + 1), f"{rss[at]:.1f}")
    Console().print(table)
    print(f"slope after the first {after[0]} jobs: {slope:+.4f} MiB a job (goal: below 0.1)")
    sys.exit(slope >= 0.1)


def measure(jobs: int, folder: Path) -> list[float]:
    """RSS in MiB after each job."""
    models, loras = write_models(folder), write_loras(folder)
    engine = DiffusionEngine("cpu", budget_bytes=int(2.2 * 4 * elements(models[0])))
    sizes = (64, 96, 128)
    adapters: tuple[tuple[LocalFile, ...], ...] = ((), (loras[0],), (), loras)
    inputs = (Inputs(), Inputs(encoded(scene())), Inputs(encoded(scene()), encoded(scene())))
    turns = zip(
        itertools.cycle(models),
        itertools.cycle(size for size in sizes for _ in range(2)),
        itertools.cycle(adapters),
        itertools.cycle(given for given in inputs for _ in range(3)),
        range(jobs),
        strict=False,
    )
    return [resident_after(engine, *turn) for turn in turns]


def resident_after(
    engine: DiffusionEngine,
    model: LocalFile,
    size: int,
    loras: tuple[LocalFile, ...],
    inputs: Inputs,
    seed: int,
) -> float:
    """Make one picture of words not used before; RSS in MiB afterwards."""
    task = ImageTask(
        prompt=f"a {sample_model.COLOURS[seed % 8]} gem number {seed}",
        seed=seed,
        steps=3,
        width=size,
        height=size,
        ext=("webp", "png", "jpg")[seed % 3],
        sampling_method=("euler_a", "heun", "dpm++2m", "lcm")[seed // 3 % 4],
        init_image_url="file:init" if inputs.init_image else None,
        mask_url="file:mask" if inputs.mask else None,
    )
    request = Request(str(seed), model.path.stem, task, CliDefaults(cfg_scale=4.0), (model, *loras), inputs)
    engine.generate(request, lambda done, total: None, Cancel())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def write_models(folder: Path) -> tuple[LocalFile, ...]:
    tensors = load_file(sample_model.WEIGHTS)
    made = []
    for index in range(3):
        path = folder / f"model{index}.safetensors"
        changed = {name: tensor * (1 + 0.01 * index) for name, tensor in tensors.items()}
        save_file(changed, path)
        made.append(LocalFile("model", path, str(path)))
    return tuple(made)


def write_loras(folder: Path) -> tuple[LocalFile, ...]:
    made = []
    for index in range(2):
        path = folder / f"lora{index}.safetensors"
        save_file(lora(index), path)
        made.append(LocalFile("lora", path, str(path)))
    return tuple(made)


def lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA in diffusers' layout for the attention of one block of the sample model."""
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(str(sample_model.CONFIG_DIR / "unet"), local_files_only=True)
    )
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_v")):
            down, up = (4, module.in_features), (module.out_features, 4)
            made[f"unet.{name}.lora_A.weight"] = 0.1 * torch.randn(down, generator=generator)
            made[f"unet.{name}.lora_B.weight"] = 0.1 * torch.randn(up, generator=generator)
    return made


def elements(model: LocalFile) -> int:
    return sum(tensor.numel() for tensor in load_file(model.path).values())


if __name__ == "__main__":
    process.prepare()
    main()
