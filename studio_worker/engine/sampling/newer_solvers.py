"""Solvers that were published since 2023: exponential integrators, CFG++, gradient estimation and others.

In the manner of solvers.py, which says what a solver is.
"""

from __future__ import annotations

import math
from itertools import pairwise

from studio_worker.engine.sampling.solvers import Course, Steps, X, ancestral, towards


def res_multistep(course: Course, x: X) -> Steps:
    """The exponential integrator of two steps of Zhang et al. 2023 (https://arxiv.org/abs/2308.02157)."""
    last: tuple[float, X] | None = None
    for level, following in pairwise(course.levels):
        picture = (yield x, level).picture
        if last is None or following == 0:
            x = towards(x, picture, level, following)
        else:
            before, earlier = last
            step = math.log(level / following)
            second = _phi2(step) * step / -math.log(before / level)
            x = x * math.exp(-step) + (picture * (_phi1(step) - second) + earlier * second) * step
        last = level, picture
    return x


def res_2s(course: Course, x: X) -> Steps:
    """The exponential integrator of two stages of Zhang et al. 2023, the second in the step's middle."""
    half = 0.5
    for level, following in pairwise(course.levels):
        first = (yield x, level).picture
        if following == 0:
            return first
        step = math.log(level / following)
        middle = level * math.exp(-step * half)
        second = (yield x + (first - x) * (step * half * _phi1(step * half)), middle).picture
        weight = _phi2(step) / half
        x = x + ((first - x) * (_phi1(step) - weight) + (second - x) * weight) * step
    return x


def _phi1(step: float) -> float:
    """φ₁(-step) of exponential integrators."""
    return -math.expm1(-step) / step


def _phi2(step: float) -> float:
    """φ₂(-step)."""
    return (1 - _phi1(step)) / step


_ER_POINTS = 200
"""In how many points the integrals are taken: the authors' own number."""


def er_sde(course: Course, x: X) -> Steps:
    """ER-SDE-Solver-3 (Cui et al. 2023, https://arxiv.org/abs/2309.06169), with the authors' noise scale."""
    earlier: list[tuple[float, X]] = []  # ratios of noise to picture, and the denoised pictures
    slope_before: X | None = None
    for level, following in pairwise(course.levels):
        picture = (yield x, level).picture
        if following == 0:
            return picture
        (kept, here), (kept_after, after) = (_signal(course.is_flow, each) for each in (level, following))
        scale = _er_scale(after) / _er_scale(here)
        x = x * (kept_after / kept * scale) + picture * (kept_after * (1 - scale))
        if earlier:
            width = (here - after) / _ER_POINTS
            places = [after + index * width for index in range(_ER_POINTS)]
            first = sum(width / _er_scale(place) for place in places)
            slope = (picture - earlier[0][1]) / (here - earlier[0][0])
            x = x + slope * (kept_after * (after - here + first * _er_scale(after)))
            if slope_before is not None:
                second = sum(width * (place - here) / _er_scale(place) for place in places)
                bend = (slope - slope_before) / ((here - earlier[1][0]) / 2)
                x = x + bend * (kept_after * ((after - here) ** 2 / 2 + second * _er_scale(after)))
            slope_before = slope
        fresh = after**2 - (here * scale) ** 2
        if fresh > 0:
            x = x + course.noise() * (kept_after * math.sqrt(fresh))
        earlier = [(here, picture), *earlier][:2]
    return x


def _signal(is_flow: bool, level: float) -> tuple[float, float]:
    """How much of the picture there is at ``level``, and how much noise for each part of it."""
    if not is_flow:
        return 1.0, level
    level = min(level, 1 - 1e-4)  # at full noise there would be none
    return 1 - level, level / (1 - level)


def _er_scale(ratio: float) -> float:
    return ratio * (math.exp(ratio**0.3) + 10)


def tcd(course: Course, x: X) -> Steps:
    """Trajectory consistency (Zheng et al. 2024, https://arxiv.org/abs/2402.19159) without fresh noise.

    Where a step goes to is a timestep of Stable Diffusion 1's table, whatever the model: what is between two
    goes to the nearer, and the last to the first timestep, which has a little noise.
    """
    for level, following in pairwise(course.levels):
        found = yield x, level
        kept = min(_ALPHAS, key=lambda alpha: abs(math.sqrt((1 - alpha) / alpha) - following))
        grown = following**2 + 1
        noise = (x - found.picture) / level
        x = found.picture * math.sqrt(kept * grown) + noise * math.sqrt((1 - kept) * grown)
    return x


def _alphas() -> tuple[float, ...]:
    first, last, product, found = math.sqrt(0.00085), math.sqrt(0.012), 1.0, []
    for index in range(1000):
        product *= 1 - (first + (last - first) * index / 999) ** 2
        found.append(product)
    return tuple(found)


_ALPHAS = _alphas()
"""Stable Diffusion 1's share of picture in the variance at every timestep (its "scaled linear" schedule)."""


def euler_cfg_pp(course: Course, x: X) -> Steps:
    """Euler with CFG++ (Chung et al. 2024, https://arxiv.org/abs/2406.08070): noise is put back as the
    negative prompt alone predicts it.
    """
    for level, following in pairwise(course.levels):
        found = yield x, level
        x = found.picture + (x - found.negative) / level * following
    return x


def euler_ancestral_cfg_pp(course: Course, x: X) -> Steps:
    """Euler with CFG++, part of the noise drawn anew: as models that predict noise do, whatever the model."""
    for level, following in pairwise(course.levels):
        found = yield x, level
        down, up, _ = ancestral(False, level, following)
        x = found.picture + (x - found.negative) / level * down
        if following > 0:
            x = x + course.noise() * up
    return x


def euler_ge(course: Course, x: X) -> Steps:
    """Gradient estimation (Permenter & Yuan 2023, https://arxiv.org/abs/2306.04848) with their gamma of 2."""
    before: X | None = None
    for level, following in pairwise(course.levels):
        found = yield x, level
        if following == 0:
            return found.picture
        slope = (x - found.picture) / level
        estimate = slope if before is None else slope * 2 - before
        x = x + estimate * (following - level)
        before = slope
    return x
