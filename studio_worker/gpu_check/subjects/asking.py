"""Small jobs for the engine, the pictures they start from, and how far apart two results are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from studio_worker import sample_model
from studio_worker.engine import Engine, Inputs, Request, StepProgress
from studio_worker.engine.families.family import Family
from studio_worker.jobs import Cancel, ImageTask, Picture
from studio_worker.models import CliDefaults, LocalFile

Kind = Literal["text", "image", "mask", "edit"]

WIDTH, HEIGHT, SEED = 64, 48, 7
PROMPT = sample_model.prompt("red", "potion", "grass")
SAMPLE = LocalFile("model", sample_model.WEIGHTS, sample_model.SHA256)


def kinds_of(family: Family) -> tuple[Kind, ...]:
    """The jobs that a family has."""
    has = family.pipelines
    ways: dict[Kind, str | None] = {
        "text": has.text,
        "image": has.image,
        "mask": has.inpaint,
        "edit": has.edit,
    }
    return tuple(kind for kind, pipeline in ways.items() if pipeline)


def nothing(_done: int, _total: int) -> None:
    """Nobody wants to know how far it is."""


def make(
    engine: Engine,
    files: Sequence[LocalFile],
    kind: Kind = "text",
    *,
    progress: StepProgress = nothing,
    cancel: Cancel | None = None,
    offload: bool = False,
    **task: Any,
) -> Picture:
    """One picture of ``files``; ``offload``: the model asks to wait in RAM."""
    start, mask = _scene(), _mask()
    given = {
        "text": Inputs(),
        "image": Inputs(start),
        "mask": Inputs(start, mask),
        "edit": Inputs(ref_image=start),
    }[kind]
    urls = {"init_image_url": given.init_image, "mask_url": given.mask, "ref_image_url": given.ref_image}
    asked: dict[str, Any] = {
        "prompt": PROMPT,
        "seed": SEED,
        "ext": "png",
        "width": WIDTH,
        "height": HEIGHT,
        "steps": 2,
        "cfg_scale": 3.0,
        "sampling_method": "euler",
        **{name: "studio:picture" for name, data in urls.items() if data is not None},
        **task,
    }
    request = Request(
        job_id="gpu-check",
        model=files[0].path.name,
        task=ImageTask(**asked),
        # By the protocol, steps of exactly 20 in a task say nothing.
        defaults=CliDefaults(offload_to_cpu=offload, steps=asked["steps"]),
        files=tuple(files),
        inputs=given,
    )
    return engine.generate(request, progress, cancel or Cancel())


@cache
def _scene() -> bytes:
    """Whose corners differ."""
    picture = Image.linear_gradient("L").rotate(90).resize((WIDTH, HEIGHT)).convert("RGB")
    ImageDraw.Draw(picture).rectangle((0, 0, WIDTH // 4, HEIGHT // 4), fill=(200, 30, 30))
    return _png(picture)


@cache
def _mask() -> bytes:
    """White on the right."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (WIDTH // 2, 0, WIDTH, HEIGHT))
    return _png(mask)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB"), dtype=int)


def levels_apart(one: Picture, other: Picture) -> float:
    """How far apart two pictures are on average, in levels of 255."""
    return float(np.abs(pixels(one) - pixels(other)).mean())
