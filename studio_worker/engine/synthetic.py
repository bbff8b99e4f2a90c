"""Placeholder pictures, for sources whose engine is ``synthetic`` and for no others.

This module owns a picture that nobody takes for a model's: coloured discs on a gradient, drawn from the
seed and the prompt, with the word on it. It needs Pillow alone and keeps to the engine's contract in all
else: parameters, progress, cancellation, metadata. Initial pictures are ignored, as is everything else a
model would read.
"""

from __future__ import annotations

import hashlib
import random
import time

from PIL import Image, ImageDraw, ImageFont

from studio_worker.engine.contract import Engine, Request, StepProgress
from studio_worker.engine.parameters import EngineDefaults, Parameters, resolve
from studio_worker.engine.pictures.encoding import Unencoded, check_ext
from studio_worker.jobs import Cancel

_DEFAULTS = EngineDefaults(sampler="none", size_multiple=1)

Colour = tuple[int, int, int]


class SyntheticEngine(Engine):
    """Draws placeholders."""

    def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Unencoded:
        """See :meth:`studio_worker.engine.contract.Engine.make`."""
        check_ext(request.task.ext)
        parameters = resolve(request.task, request.defaults, _DEFAULTS, from_image=False)
        started = time.perf_counter()
        picture = _draw(parameters, progress, cancel)
        timings_s = {"load": 0.0, "generate": time.perf_counter() - started}
        return Unencoded(picture, parameters, request.model, "synthetic", "synthetic", timings_s)


def _draw(parameters: Parameters, progress: StepProgress, cancel: Cancel) -> Image.Image:
    """The picture: one disc a step."""
    cancel.check()
    digest = hashlib.sha256(f"{parameters.seed}\0{parameters.prompt}".encode()).digest()
    chance = random.Random(digest)
    size = (parameters.width, parameters.height)
    picture = _gradient(size, _colour(chance, 40, 120), _colour(chance, 150, 235))
    for step in range(parameters.steps):
        disc = _disc(size, chance)
        picture.paste(_colour(chance, 90, 255), mask=disc)
        progress(step + 1, parameters.steps)
        cancel.check()
    _write(picture, "synthetic")
    return picture


def _colour(chance: random.Random, low: int, high: int) -> Colour:
    return chance.randint(low, high), chance.randint(low, high), chance.randint(low, high)


def _gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), ramp)


def _disc(size: tuple[int, int], chance: random.Random) -> Image.Image:
    """A disc somewhere in the picture, a quarter opaque, as a mask."""
    width, height = size
    radius = chance.uniform(0.04, 0.25) * min(size)
    x, y = chance.uniform(0, width), chance.uniform(0, height)
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=64)
    return mask


def _write(picture: Image.Image, word: str) -> None:
    """``word`` across the lower part, as wide as two thirds of the picture."""
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    size = max(4.0, min(height / 3, width * 2 / 3 / draw.textlength(word, ImageFont.load_default(100)) * 100))
    font = ImageFont.load_default(size)
    place = (width / 2, height * 0.8)
    draw.text(
        place, word, "white", font, anchor="mm", stroke_width=max(1, round(size / 12)), stroke_fill="black"
    )
