"""The way from noise to a picture's latents: a solver, a model to ask, and what may not change.

This module owns the loop. ``x`` is kept in single precision on the device; levels and the factors that come
of them are plain numbers, so that no step waits for the device to tell the CPU anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from studio_worker.engine.sampling.levels import Scale
from studio_worker.engine.sampling.noise import Noise
from studio_worker.engine.sampling.solvers import Course, Denoised, Solver

Predict = Callable[[torch.Tensor, float], Sequence[torch.Tensor]]
"""The denoiser's outputs for its input and timestep: for the prompt, then for a negative one that counts."""


@dataclass(frozen=True)
class Kept:
    """What the latents of a picture keep: all but where ``mask``, 0 and 1 by cell, is 1."""

    picture: torch.Tensor
    mask: torch.Tensor


def drawn(noise: Noise, like: torch.Tensor) -> torch.Tensor:
    """The next draw of ``noise``, as large as ``like`` and on its device, in single precision."""
    numbers = torch.from_numpy(noise.draw(like.shape))
    if like.device.type == "cuda":
        return numbers.pin_memory().to(like.device, non_blocking=True)
    return numbers.to(like.device)


def noised(scale: Scale, level: float, picture: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """``picture`` at the noise level ``level``."""
    kept, fresh = scale.weights(level)
    return picture * kept + noise * fresh


def denoise(
    solver: Solver,
    course: Course,
    x: torch.Tensor,
    ask: Callable[[torch.Tensor, float], Denoised],
    on_evaluation: Callable[[int, int], None],
) -> torch.Tensor:
    """What ``solver`` makes of ``x``. ``on_evaluation`` is told how many of how many evaluations are done."""
    total = evaluations(solver, course)
    steps = solver(course, x)
    wanted = next(steps)
    done = 0
    while True:
        answer = ask(*wanted)
        done += 1
        on_evaluation(done, total)
        try:
            wanted = steps.send(answer)
        except StopIteration as finished:
            found: torch.Tensor = finished.value
            return found


def evaluations(solver: Solver, course: Course) -> int:
    """How often ``solver`` asks the model, found by a run with plain numbers."""
    steps = solver(Course(course.levels, course.is_flow, lambda: 0.0), 0.0)
    next(steps)
    count = 1
    while True:
        try:
            steps.send(Denoised(0.0, 0.0))
        except StopIteration:
            return count
        count += 1


def asking(
    scale: Scale, predict: Predict, guidance: float, kept: Kept | None = None
) -> Callable[[torch.Tensor, float], Denoised]:
    """What a solver asks: a denoiser with classifier-free guidance (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598) that leaves alone what is kept.
    """

    def ask(x: torch.Tensor, level: float) -> Denoised:
        outputs = [output.float() for output in predict(x * scale.input_scale(level), scale.timestep(level))]
        of_x, of_output = scale.denoised_weights(level)
        guided = outputs[0]
        if len(outputs) > 1:
            guided = outputs[1] + guidance * (outputs[0] - outputs[1])
        picture = x * of_x + guided * of_output
        if kept is not None:
            picture = picture * kept.mask + kept.picture * (1 - kept.mask)
        return Denoised(picture, x * of_x + outputs[-1] * of_output)

    return ask
