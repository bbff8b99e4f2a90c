"""Samplers: stable-diffusion.cpp's names, and the solver and noise levels behind each.

This module owns the names that a task may use. All of them serve every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from studio_worker.engine.sampling import levels, newer_solvers, solvers
from studio_worker.errors import JobImpossible


@dataclass(frozen=True)
class Sampler:
    """What one of the names stands for.

    Args:
        solver: the published method of that name.
        points: the timesteps that a number of steps goes through.
    """

    solver: solvers.Solver
    points: Callable[[int], list[float]] = levels.even


SAMPLERS: Mapping[str, Sampler] = {
    "euler": Sampler(solvers.euler),
    "euler_a": Sampler(solvers.euler_ancestral),
    "heun": Sampler(solvers.heun),
    "dpm2": Sampler(solvers.dpm2),
    "dpm++2s_a": Sampler(solvers.dpmpp_2s_ancestral),
    "dpm++2m": Sampler(solvers.dpmpp_2m),
    "dpm++2mv2": Sampler(solvers.dpmpp_2m_v2),
    "ipndm": Sampler(solvers.ipndm),
    "ipndm_v": Sampler(solvers.ipndm_v),
    "lcm": Sampler(solvers.lcm, levels.distilled),
    "ddim_trailing": Sampler(solvers.euler, levels.trailing),
    "tcd": Sampler(newer_solvers.tcd, levels.distilled),
    "res_multistep": Sampler(newer_solvers.res_multistep),
    "res_2s": Sampler(newer_solvers.res_2s),
    "er_sde": Sampler(newer_solvers.er_sde),
    "euler_cfg_pp": Sampler(newer_solvers.euler_cfg_pp),
    "euler_a_cfg_pp": Sampler(newer_solvers.euler_ancestral_cfg_pp),
    "euler_ge": Sampler(newer_solvers.euler_ge),
}


def sampler(name: str) -> Sampler:
    """
    Raises:
        JobImpossible: no sampler of that name.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    raise JobImpossible(f"unknown samplingMethod {name!r}; known: {', '.join(SAMPLERS)}")


def noise_levels(name: str, scale: levels.Scale, steps: int, denoise: float | None = None) -> list[float]:
    """The noise levels of a job from its first to the closing 0.

    Args:
        scale: what timesteps stand for in the model.
        denoise: where a picture is given, how much of it may change.
    """
    found = [scale.level(point) for point in sampler(name).points(steps)]
    skipped = 0 if denoise is None else steps - levels.steps_from_picture(steps, denoise)
    return [*found[skipped:], 0.0]
