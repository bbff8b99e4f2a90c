"""Solvers that stable-diffusion.cpp has and diffusers has not, as diffusers schedulers.

This module owns four update rules and nothing else: noise levels, scaling and prediction types are
inherited. All work on the variance-exploding form, where ``x = x0 + sigma * noise`` and ``dx/dsigma = (x -
x0) / sigma``. Those called ``…Rule`` are written so that flow_solvers.py can use them too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, KDPM2AncestralDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor


# diffusers has no types, so that mypy sees ``Any`` as the base of every scheduler below.
class _NoiseScheduler(EulerDiscreteScheduler):  # type: ignore[misc]
    """What the rules need of their scheduler."""

    def denoised(self, output: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return denoised(self.config.prediction_type, output, x, sigma)


class MultistepRule:
    """Mixed into a scheduler: one model evaluation a step, and a look back at earlier ones."""

    memory = 1
    """How many earlier evaluations :meth:`advance` wants to see."""

    past: list[tuple[float, torch.Tensor]]
    """Noise level and what was remembered of it, newest first."""

    # By what its signature names, the pipelines tell what a scheduler takes; ``mu`` and ``sigmas`` of flows.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        given = {name: value for name, value in given.items() if value is not None}
        super().set_timesteps(num_inference_steps, device, **given)  # type: ignore[misc]
        self.past = []
        # A copy, since reading a number from a GPU's tensor at every step would make the CPU wait for it.
        self.levels: list[float] = self.sigmas.tolist()  # type: ignore[attr-defined]

    def step(
        self: Any,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = False,  # noqa: ARG002 (the pipelines pass False and want a tuple)
    ) -> tuple[torch.Tensor]:
        """One step from ``sample`` (batch, …) to the next lower noise level."""
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, following = self.levels[self.step_index : self.step_index + 2]
        x = sample.float()  # half precision loses the small differences that the look back is made of
        x0 = self.denoised(model_output.float(), x, sigma)
        x = self.advance(x, x0, sigma, following)
        self._step_index += 1
        return (x.to(model_output.dtype),)

    def advance(self, x: torch.Tensor, x0: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        """``x`` at noise level ``following``, from ``x`` at ``sigma`` whose denoised picture is ``x0``."""
        raise NotImplementedError

    def remember(self, sigma: float, value: torch.Tensor) -> None:
        self.past = [(sigma, value), *self.past][: self.memory]


def denoised(prediction_type: str, output: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The denoised picture that the model's ``output`` for ``x`` at noise level ``sigma`` stands for."""
    if prediction_type == "epsilon":
        return x - sigma * output
    if prediction_type == "v_prediction":  # Salimans & Ho 2022, appendix D, with alpha = 1 / sqrt(sigma² + 1)
        return x / (sigma**2 + 1) - output * (sigma / math.sqrt(sigma**2 + 1))
    raise ValueError(f"prediction type {prediction_type} is not one of epsilon, v_prediction")


class DPMSolver2Mv2Rule(MultistepRule):
    """DPM++ 2M v2: DPM-Solver++(2M) with the mean of the last two log-noise steps as its step.

    The change to Lu et al. 2022 (https://arxiv.org/abs/2211.01095) that AUTOMATIC1111's discussion 8457
    proposed and stable-diffusion.cpp has as ``dpm++2mv2``. With even log-noise steps it is the 2M solver
    itself; with uneven ones it gives the denoised picture more weight than a consistent solver would, which
    is the sharpening that it is asked for.
    """

    def advance(self, x: torch.Tensor, x0: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        past = self.past
        self.remember(sigma, x0)
        if following == 0:
            return x0
        step = math.log(sigma / following)
        target, decay = x0, -math.expm1(-step)
        if past:
            before, earlier = past[0]
            last = math.log(before / sigma)
            longer, shorter = max(step, last), min(step, last)
            slope = shorter / (2 * longer)
            target, decay = x0 + slope * (x0 - earlier), -math.expm1(-(longer + shorter) / 2)
        return (following / sigma) * x + decay * target


class DPMSolver2Mv2(DPMSolver2Mv2Rule, _NoiseScheduler):
    """:class:`DPMSolver2Mv2Rule` for models that predict noise."""


class IPNDMRule(MultistepRule):
    """iPNDM (Zhang & Chen 2022, https://arxiv.org/abs/2204.13902): Adams-Bashforth with fixed weights.

    Order 4, rising from 1 as evaluations come in, with no warm-up evaluations.
    """

    memory = 3

    WEIGHTS = (
        (1.0,),
        (3 / 2, -1 / 2),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )
    """Adams-Bashforth weights of orders 1 to 4, newest evaluation first."""

    def advance(self, x: torch.Tensor, x0: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        slopes = [(sigma, (x - x0) / sigma), *self.past]
        weights = self.weights([level for level, _ in slopes], following)
        self.remember(*slopes[0])
        change = sum(weight * slope for weight, (_, slope) in zip(weights, slopes, strict=True))
        return x + (following - sigma) * change

    def weights(self, levels: list[float], following: float) -> tuple[float, ...]:  # noqa: ARG002
        """The weight of the slope at each of ``levels`` (newest first) in a step to ``following``."""
        return self.WEIGHTS[len(levels) - 1]


class IPNDMVariableRule(IPNDMRule):
    """iPNDM with the Adams-Bashforth weights that uneven noise levels ask for (``ipndm_v``)."""

    def weights(self, levels: list[float], following: float) -> tuple[float, ...]:
        # The polynomial through the slopes, integrated over the step: the moments of both sides agree.
        # Measured from the step's start in units of its length, so that the small system below stays well
        # conditioned.
        length = following - levels[0]
        places = [(level - levels[0]) / length for level in levels]
        orders = np.arange(len(levels))
        solution = np.linalg.solve(np.power.outer(places, orders).T, 1.0 / (orders + 1))
        return tuple(float(weight) for weight in solution)


class IPNDM(IPNDMRule, _NoiseScheduler):
    """:class:`IPNDMRule` for models that predict noise."""


class IPNDMVariable(IPNDMVariableRule, _NoiseScheduler):
    """:class:`IPNDMVariableRule` for models that predict noise."""


class DPMSolver2SAncestral(KDPM2AncestralDiscreteScheduler):  # type: ignore[misc]
    """DPM++ 2S a: ancestral DPM-Solver++(2S) (Lu et al. 2022; k-diffusion's ``sample_dpmpp_2s_ancestral``).

    Noise levels and the half step to the middle one are those of DPM2 a, since the exponential integrator's
    first order step is Euler's. They differ in the second evaluation: there, its denoised picture carries
    the whole step.
    """

    sample: torch.Tensor | None
    """What the step started from, between its two evaluations."""

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """One of the two evaluations of a step; ``sample`` is (batch, channels, height, width)."""
        start = self.sample
        if start is None:
            halfway: tuple[torch.Tensor, ...] = super().step(
                model_output, timestep, sample, generator=generator, return_dict=return_dict
            )
            return halfway
        # Both evaluations of a step find their noise levels where DPM2 a keeps those of the second.
        here = self.step_index - 1
        sigma, middle, up, down = (
            float(levels[here])
            for levels in (self.sigmas, self.sigmas_interpol, self.sigmas_up, self.sigmas_down)
        )
        x0 = denoised(self.config.prediction_type, model_output.float(), sample.float(), middle)
        kept = down / sigma
        noise = randn_tensor(
            model_output.shape, generator=generator, device=model_output.device, dtype=torch.float32
        )
        x = kept * start.float() + (1 - kept) * x0 + up * noise
        self.sample = None
        self._step_index += 1
        return (x.to(model_output.dtype),)
