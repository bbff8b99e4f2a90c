"""Every family with every sampler, for every kind of job, through the engine's own door."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import FAMILIES
from studio_worker.engine.families.parts.unet import UNetFamily
from studio_worker.engine.families.stable_diffusion import StableDiffusion2
from studio_worker.engine.sampling.samplers import SAMPLERS
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import encoded, scene
from tests.lab.flow_models import make, pixels

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIDE = 64
DEFAULTS = CliDefaults(width=SIDE, height=SIDE, steps=2, cfg_scale=1.0)
SERVED = {family.name: family for family in FAMILIES if family.name != "sample"}
SPEAKING = (
    "sd1",
    "sd1-inpaint",
    "sdxl",
    "z-image",
    "qwen-image",
    "flux1-dev",
    "flux1-fill",
    "sd3-medium",
    "chroma",
)
"""Families that are tried in full; the others differ from them in sizes, names and levels alone. With
``MATRIX=full`` in the environment all are.
"""


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    return {name: tiny(name, tmp_path_factory.mktemp(name), width=32) for name in SERVED}


@pytest.fixture(scope="module")
def files(tinies: dict[str, Tiny]) -> dict[str, tuple[LocalFile, ...]]:
    return {name: each.files() for name, each in tinies.items()}


@pytest.fixture(scope="module")
def engines(tinies: dict[str, Tiny]) -> dict[str, DiffusionEngine]:
    return {name: DiffusionEngine("cpu", families=(each.family,)) for name, each in tinies.items()}


def jobs(name: str) -> dict[str, tuple[Inputs, float | None]]:
    """What a family can be asked for: inputs and ``denoise`` by what it is called."""
    start = encoded(scene(SIDE, SIDE))
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    masked = Inputs(start, encoded(mask))
    pipelines = SERVED[name].pipelines
    asked: dict[str, tuple[Inputs, float | None]] = {}
    if pipelines.text:
        asked["text"] = Inputs(), None
    if pipelines.image:
        asked |= {"low": (Inputs(start), 0.2), "high": (Inputs(start), 0.9)}
    if pipelines.inpaint:
        asked["mask"] = masked, 0.75
    return asked


def steps_of(name: str, kind: str) -> tuple[int, ...]:
    """With how many steps a kind of job is tried: fewer for families that another one speaks for."""
    if os.environ.get("MATRIX") == "full":
        return 1, 2, 8
    if name not in SPEAKING:
        return (2,)
    return {"text": (1, 2, 8), "low": (1, 8), "high": (2,), "mask": (1, 2)}[kind]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SERVED)
def test_every_sampler_makes_every_kind_of_picture(
    name: str, sampler: str, files: dict[str, tuple[LocalFile, ...]], engines: dict[str, DiffusionEngine]
) -> None:
    """Whatever family, sampler, kind of job and number of steps: a picture that shows something, and that
    keeps what a mask protects.
    """
    for kind, (inputs, denoise) in jobs(name).items():
        for steps in steps_of(name, kind):
            asked = {} if denoise is None else {"denoise": denoise}
            made = make(
                engines[name],
                files[name],
                defaults=DEFAULTS,
                inputs=inputs,
                steps=steps,
                sampling_method=sampler,
                **asked,
            )
            picture = pixels(made)
            assert picture.shape == (SIDE, SIDE, 3)
            assert float(picture.std()) > 5, (kind, steps)
            if kind == "mask":
                kept = np.s_[:, : SIDE // 2]
                assert (picture[kept] == pixels(scene(SIDE, SIDE))[kept]).all()


def test_every_way_of_computing_is_tried_in_full() -> None:
    """Each class of family has one that is tried with every number of steps."""
    assert {type(SERVED[name]) for name in SPEAKING} | {StableDiffusion2} == set(map(type, SERVED.values()))
    seeing = {name for name, family in SERVED.items() if family.sees_mask}
    assert seeing & set(SPEAKING)


@pytest.mark.parametrize("name", SERVED)
def test_picture_has_the_size_that_was_asked_for(
    name: str, files: dict[str, tuple[LocalFile, ...]], engines: dict[str, DiffusionEngine]
) -> None:
    """Transformers make a picture of exactly the size asked for, in whole cells of 8 pixels; UNets one whose
    sides are the next multiples of 64; both as stable-diffusion.cpp does.
    """
    inputs = jobs(name)["mask"][0] if SERVED[name].sees_mask else Inputs()
    defaults = DEFAULTS.model_copy(update={"width": 72, "height": 33})
    made = make(
        engines[name], files[name], defaults=defaults, inputs=inputs, steps=1, sampling_method="euler"
    )
    is_unet = isinstance(SERVED[name], UNetFamily)
    assert pixels(made).shape[:2] == ((64, 128) if is_unet else (40, 72))
    assert (made.meta["askedWidth"], made.meta["askedHeight"]) == (72, 33)


@pytest.mark.parametrize("name", SERVED)
def test_smallest_and_longest_pictures_are_made(
    name: str, files: dict[str, tuple[LocalFile, ...]], engines: dict[str, DiffusionEngine]
) -> None:
    """A picture of 16 pixels, and one that is eight times as long as high, are made by every family."""
    inputs = jobs(name)["mask"][0] if SERVED[name].sees_mask else Inputs()
    for width, height in ((16, 16), (16, 128), (128, 16)):
        defaults = DEFAULTS.model_copy(update={"width": width, "height": height})
        made = make(engines[name], files[name], defaults=defaults, inputs=inputs, steps=1)
        is_unet = isinstance(SERVED[name], UNetFamily)
        sides = (max(64, side) if is_unet else side for side in (height, width))
        assert pixels(made).shape[:2] == tuple(sides)
