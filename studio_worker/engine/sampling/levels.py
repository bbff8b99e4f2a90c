"""Noise levels: how much noise a model sees at which timestep, and which levels a job's steps go through.

The points are stable-diffusion.cpp's, so that a job gives the same picture there and here: ``n`` steps see
``n`` levels between the highest and the lowest, and the last one goes from there to none at all. Levels are
plain numbers: what a step needs of them never waits for a GPU.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

TIMESTEPS = 1000
"""What all served models were trained with, numbered from 0."""

_DISTILLED_STEPS = 50
"""Steps of the grid that LCM models were distilled on (Luo et al. 2023, https://arxiv.org/abs/2310.04378)."""


class Scale(Protocol):
    """What a model's timesteps stand for. ``x`` is a picture at some noise level."""

    is_flow: bool

    def level(self, timestep: float) -> float:
        """The noise level at a timestep, which may lie between two."""

    def timestep(self, level: float) -> float:
        """What the denoiser is told for a noise level."""

    def weights(self, level: float) -> tuple[float, float]:
        """How much of picture and of noise there is in ``x`` at ``level``."""

    def input_scale(self, level: float) -> float:
        """What the denoiser wants ``x`` multiplied with."""

    def denoised_weights(self, level: float) -> tuple[float, float]:
        """How much of ``x`` and of the denoiser's output there is in the denoised picture."""


@dataclass(frozen=True)
class Flow:
    """Models that predict a flow: ``x = (1 - level) * picture + level * noise``.

    Args:
        shift: ``s`` in ``s * t / (1 + (s - 1) * t)`` (Esser et al. 2024, https://arxiv.org/abs/2403.03206).
    """

    shift: float
    is_flow = True

    def level(self, timestep: float) -> float:
        plain = (timestep + 1) / TIMESTEPS
        return self.shift * plain / (1 + (self.shift - 1) * plain)

    def timestep(self, level: float) -> float:
        return level * TIMESTEPS

    def weights(self, level: float) -> tuple[float, float]:
        return 1 - level, level

    def input_scale(self, level: float) -> float:  # noqa: ARG002
        return 1.0

    def denoised_weights(self, level: float) -> tuple[float, float]:
        return 1.0, -level


@dataclass(frozen=True)
class Diffusion:
    """Models that predict noise or v: ``x = picture + level * noise``.

    Args:
        alphas_cumprod: the share of picture in the variance at every timestep, falling.
        predicts_v: whether the denoiser predicts v (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512).
    """

    alphas_cumprod: Sequence[float]
    predicts_v: bool = False
    is_flow = False

    def level(self, timestep: float) -> float:
        below = int(timestep)
        above = min(below + 1, TIMESTEPS - 1)
        share = timestep - below
        logs = self._log(below), self._log(above)
        return math.exp((1 - share) * logs[0] + share * logs[1])

    def timestep(self, level: float) -> float:
        log = math.log(level)
        below = bisect_right(range(TIMESTEPS), log, key=self._log) - 1
        below = min(max(below, 0), TIMESTEPS - 2)
        low, high = self._log(below), self._log(below + 1)
        return below + min(max((log - low) / (high - low), 0.0), 1.0)

    def weights(self, level: float) -> tuple[float, float]:
        return 1.0, level

    def input_scale(self, level: float) -> float:
        return 1 / math.sqrt(level**2 + 1)

    def denoised_weights(self, level: float) -> tuple[float, float]:
        if self.predicts_v:
            return 1 / (level**2 + 1), -level / math.sqrt(level**2 + 1)
        return 1.0, -level

    def _log(self, timestep: int) -> float:
        share = self.alphas_cumprod[timestep]
        return 0.5 * math.log((1 - share) / share)


def even(steps: int) -> list[float]:
    """Points from the last timestep to the first, equally far apart."""
    if steps == 1:
        return [TIMESTEPS - 1.0]
    return [(TIMESTEPS - 1) * (1 - index / (steps - 1)) for index in range(steps)]


def distilled(steps: int) -> list[float]:
    """Points of the grid that LCM models were distilled on."""
    stride = TIMESTEPS // _DISTILLED_STEPS
    return [(_DISTILLED_STEPS - index * _DISTILLED_STEPS // steps) * stride - 1.0 for index in range(steps)]


def trailing(steps: int) -> list[float]:
    """Points that begin at the last timestep and leave the first out (Lin et al. 2023,
    https://arxiv.org/abs/2305.08891), cut down to whole ones.
    """
    return [float(TIMESTEPS - 1 - index * TIMESTEPS // steps) for index in range(steps)]


def steps_from_picture(steps: int, denoise: float) -> int:
    """How many of ``steps`` run where a picture is given.

    stable-diffusion.cpp's count: one more than the share, at most all.
    """
    if denoise >= 1:
        return steps
    share = int(np.float32(steps) * np.float32(denoise))  # its product is in single precision
    return min(share + 1, steps)
