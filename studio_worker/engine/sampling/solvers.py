"""Solvers: how a picture is got out of noise, by asking a model for the denoised picture again and again.

This module owns the update rules and nothing else. Every solver is a generator: it yields where it wants the
model to look (``x`` and its noise level), is sent what the model makes of it, and returns the last ``x``. All
work on ``dx/dlevel = (x - denoised) / level``, which holds for models that predict noise and for flows alike;
where noise is drawn anew the two differ. They use arithmetic alone: ``x`` may be a tensor or a number.

Written from the papers that they cite; defaults (eta, gamma) are stable-diffusion.cpp's. Levels are at least
one and the closing 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

X = Any
"""A picture with noise: a tensor, or a number in its place."""


class Denoised(NamedTuple):
    """The denoised picture that a model predicts, and what it predicts for the negative prompt alone."""

    picture: X
    negative: X


@dataclass(frozen=True)
class Course:
    """What a solver goes along.

    Args:
        levels: from the highest noise level to 0.
        is_flow: whether picture and noise share the weight 1 (rectified flow).
        noise: draws noise as large as ``x``.
    """

    levels: Sequence[float]
    is_flow: bool
    noise: Callable[[], X]


Steps = Generator[tuple[X, float], Denoised, X]
Solver = Callable[[Course, X], Steps]


def euler(course: Course, x: X) -> Steps:
    """Euler's method (Karras et al. 2022, https://arxiv.org/abs/2206.00364); DDIM without noise is it too."""
    for level, following in pairwise(course.levels):
        found = yield x, level
        x = towards(x, found.picture, level, following)
    return x


def euler_ancestral(course: Course, x: X) -> Steps:
    """Euler's method, with part of the noise drawn anew at every step."""
    for level, following in pairwise(course.levels):
        found = yield x, level
        down, _, _ = step = ancestral(course.is_flow, level, following)
        x = renoised(course, towards(x, found.picture, level, down), step)
    return x


def heun(course: Course, x: X) -> Steps:
    """Heun's method (Karras et al. 2022, algorithm 1): the mean of the slopes at both ends."""
    for level, following in pairwise(course.levels):
        found = yield x, level
        if following == 0:
            return found.picture
        slope = (x - found.picture) / level
        predicted = x + slope * (following - level)
        found = yield predicted, following
        x = x + (slope + (predicted - found.picture) / following) / 2 * (following - level)
    return x


def dpm2(course: Course, x: X) -> Steps:
    """DPM-Solver-2 (Karras et al. 2022, algorithm 2 without churn): the slope in the middle of log levels."""
    for level, following in pairwise(course.levels):
        found = yield x, level
        if following == 0:
            return found.picture
        middle = math.sqrt(level * following)
        halfway = towards(x, found.picture, level, middle)
        found = yield halfway, middle
        x = x + (halfway - found.picture) / middle * (following - level)
    return x


def dpmpp_2s_ancestral(course: Course, x: X) -> Steps:
    """DPM-Solver++(2S) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 1), part of the noise
    drawn anew at every step. The middle is that of the log of signal to noise: for flows, of the logit.
    """
    for level, following in pairwise(course.levels):
        found = yield x, level
        down, _, _ = step = ancestral(course.is_flow, level, following)
        # At full noise a flow has no signal, and the middle is the step's own start.
        if down > 0 and not (course.is_flow and level >= 1 - 1e-6):
            if course.is_flow:
                signal = math.sqrt((1 - level) / level * (1 - down) / down)
                middle = 1 / (signal + 1)
            else:
                middle = math.sqrt(level * down)
            found = yield towards(x, found.picture, level, middle), middle
        x = renoised(course, towards(x, found.picture, level, down), step)
    return x


def dpmpp_2m(course: Course, x: X) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) over log levels."""
    return (yield from _dpmpp_multistep(course, x, sharpens=False))


def dpmpp_2m_v2(course: Course, x: X) -> Steps:
    """DPM-Solver++(2M) with the mean of the last two log-level steps as its step.

    AUTOMATIC1111's discussion 8457. With even steps it is the solver itself; with uneven ones it gives the
    denoised picture more weight than a consistent solver would, which is the sharpening that it is asked for.
    """
    return (yield from _dpmpp_multistep(course, x, sharpens=True))


def _dpmpp_multistep(course: Course, x: X, *, sharpens: bool) -> Steps:
    last: tuple[float, X] | None = None  # the last step's length and denoised picture
    for level, following in pairwise(course.levels):
        picture = (yield x, level).picture
        if following == 0:
            return picture
        step = math.log(level / following)
        target, decay = picture, -math.expm1(-step)
        if last is not None:
            before, earlier = last
            ratio = before / step
            if sharpens:
                ratio = max(before, step) / min(before, step)
                decay = -math.expm1(-(before + step) / 2)
            target = picture + (picture - earlier) / (2 * ratio)
        x = x * (following / level) + target * decay
        last = step, picture
    return x


def lcm(course: Course, x: X) -> Steps:
    """Latent consistency (Luo et al. 2023, https://arxiv.org/abs/2310.04378): all noise drawn anew."""
    for level, following in pairwise(course.levels):
        x = (yield x, level).picture
        if following > 0:
            kept = 1 - following if course.is_flow else 1.0
            x = x * kept + course.noise() * following
    return x


_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of orders 1 to 4, newest slope first."""


def ipndm(course: Course, x: X) -> Steps:
    """iPNDM (Zhang & Chen 2022, https://arxiv.org/abs/2204.13902): Adams-Bashforth, without warm-up."""
    return (yield from _adams_bashforth(course, x, is_variable=False))


def ipndm_v(course: Course, x: X) -> Steps:
    """iPNDM whose second order has the weights that uneven levels ask for."""
    return (yield from _adams_bashforth(course, x, is_variable=True))


def _adams_bashforth(course: Course, x: X, *, is_variable: bool) -> Steps:
    slopes: list[X] = []
    before = 0.0
    for level, following in pairwise(course.levels):
        found = yield x, level
        slopes = [(x - found.picture) / level, *slopes][:4]
        weights = _ADAMS_BASHFORTH[len(slopes) - 1]
        if is_variable and len(slopes) == 2:
            ratio = (following - level) / (level - before)
            weights = (1 + ratio / 2, -ratio / 2)
        change = sum(slope * weight for slope, weight in zip(slopes, weights, strict=True))
        x = x + change * (following - level)
        before = level
    return x


def towards(x: X, picture: X, level: float, following: float) -> X:
    """``x`` moved from ``level`` to ``following`` on the straight line to ``picture``."""
    return x + (x - picture) / level * (following - level)


def ancestral(is_flow: bool, level: float, following: float) -> tuple[float, float, float]:
    """The level that an ancestral step goes down to, how much fresh noise brings it up to ``following``, and
    what ``x`` is multiplied with before.

    Of the variance at ``following``, a share as large as the step is fresh (eta = 1 in k-diffusion). A flow
    is scaled so that picture and noise have their weights again.
    """
    if following == 0:
        return 0.0, 0.0, 1.0
    if not is_flow:
        up = min(following, following * math.sqrt(max(level**2 - following**2, 0.0)) / level)
        return math.sqrt(following**2 - up**2), up, 1.0
    down = following * following / level
    scale = (1 - following) / (1 - down)
    return down, math.sqrt(max(following**2 - (scale * down) ** 2, 0.0)), scale


def renoised(course: Course, x: X, step: tuple[float, float, float]) -> X:
    _, up, scale = step
    return x * scale + course.noise() * up if up > 0 else x
