"""Which value wins, and which values are refused: from a task and its model's defaults to one set of
parameters.

This module owns the precedence of the protocol (the task's own, else the model's, else the engine's) and the
limits. It imports no torch and knows no model family but through :class:`EngineDefaults`.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from studio_worker.errors import JobImpossible
from studio_worker.jobs import ImageTask
from studio_worker.models import CliDefaults

STUDIO_STEPS = 20
"""The studio's own default: a task that says exactly this has said nothing (protocol §4)."""

MAX_STEPS = 150
"""More than any sampler gains from, and few enough that one job cannot hold a worker for hours."""

MIN_SIDE_PX, MAX_SIDE_PX = 16, 4096
MAX_PIXELS = 4096 * 2048
"""Above this the VAE alone wants more memory than the cards this worker is for have."""

LATENT_PX, UNET_PX = 8, 64
"""What sides are rounded up to: a cell of latents, and for UNets, which halve them three times, eight cells.
stable-diffusion.cpp's; of transformers' pictures nothing but the cell is rounded.
"""

MAX_GUIDANCE = 50.0
"""Pictures burn out long before; what is higher is a mistake in units."""

MAX_FLOW_SHIFT = 100.0
"""Published models use 1 to 17; beyond this all steps but the last would lie at full noise."""

MAX_SEED = 2**64 - 1
"""The largest seed that :meth:`torch.Generator.manual_seed` takes."""

RANDOM_SEED_BITS = 32
"""Seeds drawn here stay exact in every JSON reader and in the widgets of other programs."""


@dataclass(frozen=True)
class EngineDefaults:
    """What applies where neither the task nor the model says anything.

    The numbers are stable-diffusion.cpp's for Stable Diffusion, which the studio's tasks are written for.
    ``size_multiple`` is in pixels: what width and height are rounded up to.
    """

    width: int = 512
    height: int = 512
    steps: int = STUDIO_STEPS
    guidance: float = 7.0
    sampler: str = "euler_a"
    size_multiple: int = LATENT_PX


@dataclass(frozen=True)
class Parameters:
    """One picture's parameters, all decided. Sizes in pixels; ``denoise`` is ``None`` without initial
    picture. ``asked_size`` is what width and height were before the family's rounding. ``flow_shift`` is the
    model's, ``None`` where its family's own holds.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    seed: int
    denoise: float | None
    ext: str
    asked_size: tuple[int, int]
    flow_shift: float | None = None
    zero_cond_t: bool | None = None


def resolve(task: ImageTask, model: CliDefaults, engine: EngineDefaults, *, from_image: bool) -> Parameters:
    """Decide every parameter of ``task``.

    Args:
        from_image: whether there is an initial picture, so that ``denoise`` means something.

    Raises:
        JobImpossible: a value is outside its limits.
    """
    own_steps = 0 if task.steps == STUDIO_STEPS else task.steps
    asked = (task.width or model.width or engine.width, task.height or model.height or engine.height)
    width, height = _size(*asked, engine)
    return Parameters(
        prompt=printable(task.prompt),
        negative_prompt=printable(task.negative_prompt or ""),
        width=width,
        height=height,
        steps=_steps(own_steps or model.steps or engine.steps),
        guidance=_guidance(task.cfg_scale or model.cfg_scale or engine.guidance),
        sampler=task.sampling_method or model.sampling_method or engine.sampler,
        seed=_seed(task.seed),
        denoise=_denoise(task.denoise) if from_image else None,
        ext=task.ext,
        asked_size=asked,
        flow_shift=_flow_shift(model.flow_shift),
        zero_cond_t=model.zero_cond_t,
    )


def printable(text: str) -> str:
    """``text`` without NUL and lone surrogates: JSON can carry them, tokenizers and picture files cannot."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")


def _size(width: int, height: int, engine: EngineDefaults) -> tuple[int, int]:
    for name, side in (("width", width), ("height", height)):
        if not MIN_SIDE_PX <= side <= MAX_SIDE_PX:
            raise _refused(f"{name} {side} px is outside {MIN_SIDE_PX} to {MAX_SIDE_PX} px")
    width, height = (-(-side // engine.size_multiple) * engine.size_multiple for side in (width, height))
    if width * height > MAX_PIXELS:
        raise _refused(f"{width}x{height} px is more than {MAX_PIXELS} pixels in all")
    return width, height


def _steps(steps: int) -> int:
    if not 1 <= steps <= MAX_STEPS:
        raise _refused(f"{steps} steps is outside 1 to {MAX_STEPS}")
    return steps


def _guidance(guidance: float) -> float:
    if not math.isfinite(guidance) or not 0 < guidance <= MAX_GUIDANCE:
        raise _refused(f"cfgScale {guidance} is outside 0 to {MAX_GUIDANCE:g}")
    return float(guidance)


def _flow_shift(shift: float | None) -> float | None:
    if shift is None or shift == 0:  # 0 says nothing, as everywhere in cliDefaults
        return None
    if not math.isfinite(shift) or not 0 < shift <= MAX_FLOW_SHIFT:
        raise _refused(f"flowShift {shift} is outside 0 to {MAX_FLOW_SHIFT:g}")
    return shift


def _denoise(denoise: float) -> float:
    if not 0 <= denoise <= 1:  # NaN lands here too
        raise _refused(f"denoise {denoise} is outside 0 to 1")
    return denoise


def _seed(seed: int | None) -> int:
    if seed is None or seed < 0:  # negative means random, as in stable-diffusion.cpp
        return secrets.randbits(RANDOM_SEED_BITS)
    if seed > MAX_SEED:
        raise _refused(f"seed {seed} is larger than {MAX_SEED}")
    return seed


def _refused(problem: str) -> JobImpossible:
    return JobImpossible(f"bad parameters: {problem}")
