"""What tests of flow models share: pictures by the engine and by the library's own pipelines, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.family import Family
from studio_worker.engine.loading import load_part, load_tokenizer
from studio_worker.engine.memory.placement import Mode, Plan
from studio_worker.engine.parameters import resolve
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.gpu_check.tiny.weights import Tensors
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import decoded, request
from tests.lab.published import Shapes
from tests.lab.stock import alike, run

PROMPT = "a red potion on grass"
WIDTH, HEIGHT, STEPS, GUIDANCE, SEED = 64, 48, 3, 3.0, 7
DEFAULTS = CliDefaults(width=WIDTH, height=HEIGHT, steps=STEPS, cfg_scale=GUIDANCE, sampling_method="euler")


def make(engine: DiffusionEngine, files: Sequence[LocalFile], **task: Any) -> Picture:
    """What the engine makes of ``files`` and :data:`DEFAULTS`, but for what ``task`` says."""
    asked = {"files": tuple(files), "defaults": DEFAULTS, "prompt": PROMPT, "seed": SEED} | task
    return engine.generate(request(**asked), lambda _done, _total: None, Cancel())


def offloaded(
    family: Family,
    files: Sequence[LocalFile],
    mode: Mode,
    starting: Starting = Starting(),  # noqa: B008
) -> Image.Image:
    """The same picture, its components coming to the device as ``mode`` says."""
    blueprint = identify(files, [family])
    cpu = torch.device("cpu")
    parts = {
        name: load_part(family.parts[name], blueprint.sections[name], cpu, torch.float32)
        if name in blueprint.sections
        else None
        for name in family.parts
    }
    task = request(prompt=PROMPT, seed=SEED).task
    parameters = resolve(task, DEFAULTS, family.defaults, from_image=starting.picture is not None)
    model = LoadedModel(family, parts, Plan(mode, tiled=False, peak_bytes=0), cpu)
    return model.render(parameters, starting, lambda _done, _total: None, Cancel()).picture


def pipeline(tiny: Tiny, cls: Any, **other: Any) -> Any:
    """The library's own pipeline over the modules of ``tiny``, but for ``other``."""
    tokenizers = {name: load_tokenizer(each) for name, each in tiny.family.tokenizers.items()}
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(tiny.family.scheduler))
    return cls(**{**tiny.parts, **tokenizers, "scheduler": scheduler, **other})


def stock(pipe: Any, shift: float = 3.0, **arguments: Any) -> Image.Image:
    """What the library's own pipeline ``pipe`` makes of the same."""
    asked = {"prompt": PROMPT, "width": WIDTH, "height": HEIGHT, "steps": STEPS, "seed": SEED, "shift": shift}
    return run(pipe, **asked | arguments)


def pixels(picture: Picture | Image.Image) -> np.ndarray:
    image = decoded(picture.data) if isinstance(picture, Picture) else picture
    return np.asarray(image.convert("RGB"), dtype=int)


def same(one: Picture | Image.Image, other: Picture | Image.Image) -> bool:
    """Whether two pictures are alike (:func:`tests.lab.stock.alike`), and show anything at all."""
    return alike(pixels(one), pixels(other)) and float(pixels(one).std()) > 5


def difference(one: Picture | Image.Image, other: Picture | Image.Image) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(pixels(one) - pixels(other)).mean())


def right_half() -> Image.Image:
    """A mask that is white on the right."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (WIDTH // 2, 0, WIDTH, HEIGHT))
    return mask


def one_column(shapes: Shapes) -> Tensors:
    """A tensor for each name, of as many rows and one column, every number another."""
    tensors: Tensors = {}
    first = 0
    for name, (rows, *columns) in shapes.items():
        tensors[name] = torch.arange(first, first + rows).reshape(rows, *(1 for _ in columns))
        first += rows
    return tensors
