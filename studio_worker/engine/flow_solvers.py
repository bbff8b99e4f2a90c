"""Solvers for models that predict a flow (rectified flow), as diffusers schedulers.

This module owns the update rules where they differ from those of models that predict noise, and how two
evaluations a step fit into diffusers' loop. Noise levels, their shift by picture size or ``flowShift``, and
how a picture is noised are inherited from diffusers' ``FlowMatchEulerDiscreteScheduler`` for all of them.

A flow model sees ``x = (1 - sigma) * x0 + sigma * noise`` and predicts ``dx/dsigma = noise - x0``; so
``x0 = x - sigma * output``, and the equation to solve, ``dx/dsigma = (x - x0) / sigma``, is the very one of
:mod:`studio_worker.engine.solvers`. stable-diffusion.cpp and ComfyUI use one set of solvers for both alike.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from studio_worker.engine.solvers import (
    DPMSolver2Mv2Rule,
    IPNDMRule,
    IPNDMVariableRule,
    MultistepRule,
)


# diffusers has no types, so that mypy sees ``Any`` as the base of every scheduler below.
class FlowScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """What the rules below need of their scheduler."""

    generator: torch.Generator | None = None
    """The job's own, since no flow pipeline hands its generator on to the scheduler's steps: without it noise
    would come from the process's, and the same seed would give another picture the next time."""

    def denoised(self, output: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The denoised picture that the model's ``output`` for ``x`` at noise level ``sigma`` stands for."""
        return x - sigma * output

    def noise_like(self, x: torch.Tensor) -> torch.Tensor:
        drawn: torch.Tensor = randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
        return drawn

    def towards(self, x: torch.Tensor, x0: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        """``x`` moved from noise level ``sigma`` to ``following`` on the straight line to ``x0``."""
        if sigma == 0:
            return x
        ratio = following / sigma
        return ratio * x + (1 - ratio) * x0

    def renoised(self, x: torch.Tensor, down: float, following: float) -> torch.Tensor:
        """``x`` at noise level ``down`` brought up to ``following`` with fresh noise.

        Scaled so that what is left of the picture has the weight ``1 - following`` again, and the noise of
        both kinds together the deviation ``following``.
        """
        if following == 0:
            return x
        scale = (1 - following) / (1 - down)
        return scale * x + math.sqrt(following**2 - (scale * down) ** 2) * self.noise_like(x)


def ancestral_level(sigma: float, following: float) -> float:
    """The noise level that an ancestral step goes down to before it adds noise up to ``following``.

    Of the variance at ``following``, a share as large as the step is fresh: eta = 1 of
    stable-diffusion.cpp's ``get_ancestral_step_flow`` and ComfyUI's ``sample_euler_ancestral_RF``.
    """
    return following * following / sigma if sigma > 0 else 0.0


class FlowEulerAncestral(MultistepRule, FlowScheduler):
    """Euler, with part of the noise drawn anew at every step."""

    def advance(self, x: torch.Tensor, x0: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        down = ancestral_level(sigma, following)
        return self.renoised(self.towards(x, x0, sigma, down), down, following)


class FlowLCM(MultistepRule, FlowScheduler):
    """Latent consistency (Luo et al. 2023, https://arxiv.org/abs/2310.04378): every step draws all noise
    anew.
    """

    def advance(self, x: torch.Tensor, x0: torch.Tensor, sigma: float, following: float) -> torch.Tensor:  # noqa: ARG002
        if following == 0:
            return x0
        return (1 - following) * x0 + following * self.noise_like(x)


class FlowDPMSolver2M(MultistepRule, FlowScheduler):
    """DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095) over log noise levels."""

    def advance(self, x: torch.Tensor, x0: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        past = self.past
        self.remember(sigma, x0)
        if not past or following == 0 or sigma == 0:
            return self.towards(x, x0, sigma, following)
        before, earlier = past[0]
        ratio = math.log(before / sigma) / math.log(sigma / following)
        return self.towards(x, x0 + (x0 - earlier) / (2 * ratio), sigma, following)


class FlowDPMSolver2Mv2(DPMSolver2Mv2Rule, FlowScheduler):
    """DPM++ 2M v2 for flows."""


class FlowIPNDM(IPNDMRule, FlowScheduler):
    """iPNDM for flows."""


class FlowIPNDMVariable(IPNDMVariableRule, FlowScheduler):
    """iPNDM with variable weights for flows."""


class _TwoEvaluations(FlowScheduler):
    """A solver that asks the model twice a step, but once in the last.

    The pipelines know nothing of it: they see a list of timesteps twice as long, and ``order`` 2 tells those
    that begin in the middle (image-to-image) how far in.
    """

    order = 2
    sigmas: torch.Tensor
    levels: list[float]
    _start: torch.Tensor | None
    """Where the step began, and the denoised picture of its first evaluation."""
    _first: torch.Tensor | None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        levels = self.sigmas.tolist()
        asked = []
        for sigma, following in itertools.pairwise(levels):
            asked += [sigma, self.second(sigma, following)] if following > 0 else [sigma]
        self.levels = [*asked, levels[-1]]
        self.sigmas = torch.tensor(self.levels, dtype=torch.float32, device=self.sigmas.device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._start = self._first = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = False,  # noqa: ARG002 (the pipelines pass False and want a tuple)
    ) -> tuple[torch.Tensor]:
        """One of the two evaluations of a step; ``sample`` is (batch, …)."""
        if self.step_index is None:
            self._init_step_index(timestep)
        at = self.step_index
        x, output = sample.float(), model_output.float()
        if at % 2:
            sigma, middle, following = self.levels[at - 1 : at + 2]
            x0 = self.denoised(output, x, middle)
            assert self._start is not None
            assert self._first is not None
            x = self.finish(self._start, self._first, x0, (sigma, middle, following))
            self._start = self._first = None
        else:
            sigma, following = self.levels[at : at + 2]
            x0 = self.denoised(output, x, sigma)
            if at + 2 < len(self.levels):
                self._start, self._first = x, x0
            x = self.towards(x, x0, sigma, following)
        self._step_index += 1
        return (x.to(model_output.dtype),)

    def second(self, sigma: float, following: float) -> float:
        """The noise level of the second evaluation in a step from ``sigma`` to ``following``."""
        return math.sqrt(sigma * following)

    def finish(
        self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, levels: tuple[float, float, float]
    ) -> torch.Tensor:
        """The step's end, from its start ``x`` and the denoised pictures of both evaluations.

        ``levels`` are those of the start, of the second evaluation, and of the end.
        """
        raise NotImplementedError


class FlowHeun(_TwoEvaluations):
    """Heun's method (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1): the mean of the
    slopes at both ends.
    """

    def second(self, sigma: float, following: float) -> float:  # noqa: ARG002
        return following

    def finish(
        self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, levels: tuple[float, float, float]
    ) -> torch.Tensor:
        sigma, _, following = levels
        predicted = self.towards(x, first, sigma, following)
        slope = ((x - first) / sigma + (predicted - second) / following) / 2
        return x + (following - sigma) * slope


class FlowDPM2(_TwoEvaluations):
    """DPM-Solver-2 (Karras et al. 2022, algorithm 2 without churn): the slope in the middle of log levels."""

    def finish(
        self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, levels: tuple[float, float, float]
    ) -> torch.Tensor:
        sigma, middle, following = levels
        halfway = self.towards(x, first, sigma, middle)
        return x + (following - sigma) * (halfway - second) / middle


class FlowDPMSolver2SAncestral(_TwoEvaluations):
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1), with part of the noise drawn anew at every step."""

    def second(self, sigma: float, following: float) -> float:
        return math.sqrt(sigma * ancestral_level(sigma, following))

    def finish(
        self,
        x: torch.Tensor,
        first: torch.Tensor,  # noqa: ARG002
        second: torch.Tensor,
        levels: tuple[float, float, float],
    ) -> torch.Tensor:
        sigma, _, following = levels
        down = ancestral_level(sigma, following)
        return self.renoised(self.towards(x, second, sigma, down), down, following)
