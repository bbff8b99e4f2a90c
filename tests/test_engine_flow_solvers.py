"""Solvers for flow models: each solves what it says it solves, in diffusers' own loop.

The model here is one whose answer is known: for data that is Gaussian with standard deviation S, the best
flow is linear, and the way from noise to data has a closed form.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from studio_worker.engine import flow_solvers
from studio_worker.engine.flow_solvers import FlowScheduler

torch.set_num_threads(1)

# diffusers meets numpy 2 in thousands of places that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

S = 0.5
ANCESTRAL = ("FlowEulerAncestral", "FlowDPMSolver2SAncestral")
"""They draw noise as they go, and keep the distribution."""
DETERMINISTIC = ("FlowDPMSolver2M", "FlowIPNDM", "FlowIPNDMVariable", "FlowHeun", "FlowDPM2")
ALL = (*ANCESTRAL, *DETERMINISTIC, "FlowDPMSolver2Mv2", "FlowLCM")


def solver(name: str, **config: object) -> FlowScheduler:
    shipped = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})
    scheduler: FlowScheduler = getattr(flow_solvers, name).from_config(shipped.config)
    scheduler.generator = torch.Generator().manual_seed(1)
    return scheduler


def variance(sigma: float) -> float:
    return (1 - sigma) ** 2 * S**2 + sigma**2


def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The perfect model's flow at ``x``."""
    sigma = float(timestep) / 1000
    x0 = x * (1 - sigma) * S**2 / variance(sigma)
    return (x - x0) / sigma


def run(scheduler: FlowScheduler, x: torch.Tensor, steps: int, skip: int = 0) -> torch.Tensor:
    """What a pipeline does from noise, or in the middle after ``skip`` steps, to latents."""
    scheduler.set_timesteps(steps, sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=1.0)
    scheduler.set_begin_index(skip * scheduler.order)
    for timestep in scheduler.timesteps[skip * scheduler.order :]:
        x = scheduler.step(model(x, timestep), timestep, x, return_dict=False)[0]
    return x


def start(count: int = 4096) -> torch.Tensor:
    return torch.randn(1, 1, 1, count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_solver_finds_the_exact_answer(name: str) -> None:
    """Without drawn noise, every solver ends where the closed form does, nearer than Euler's method does."""
    exact = start() * S
    error = float((run(solver(name), start(), 50) - exact).abs().max())
    euler = float((run(FlowMatchEulerDiscreteScheduler(shift=3.0), start(), 50) - exact).abs().max())
    assert error < 0.03
    assert error < euler


@pytest.mark.parametrize("name", ["FlowHeun", "FlowDPM2"])
def test_second_order_solver_is_one(name: str) -> None:
    """Twice the steps leave about a quarter of the error."""
    coarse, fine = (
        float((run(solver(name, shift=1.0), start(), n) - start() * S).abs().max()) for n in (16, 32)
    )
    assert fine < 0.4 * coarse


@pytest.mark.parametrize("name", ANCESTRAL)
def test_ancestral_solver_keeps_the_distribution(name: str) -> None:
    """With noise drawn at every step, what comes out is still spread as the data is."""
    found = run(solver(name), start(), 300)
    assert float(found.std()) == pytest.approx(S, rel=0.06)
    assert float(found.mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("config", [{}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.02}])
def test_few_and_many_steps_work(name: str, config: dict[str, object]) -> None:
    """Every solver works with one step and with many, with every kind of shift."""
    for steps in (1, 2, 3, 60):
        if steps > 1 or "shift_terminal" not in config:  # which diffusers cannot stretch over one step
            assert torch.isfinite(run(solver(name, **config), start(8), steps)).all()


@pytest.mark.parametrize("name", ANCESTRAL + DETERMINISTIC)
def test_solver_begins_in_the_middle(name: str) -> None:
    """From a half-noised picture, as image-to-image starts, every solver goes on from that noise level."""
    scheduler = solver(name)
    scheduler.set_timesteps(200, sigmas=torch.linspace(1.0, 1 / 200, 200).tolist())
    sigma = float(scheduler.sigmas[150 * scheduler.order])
    found = run(solver(name), start() * math.sqrt(variance(sigma)), 200, skip=150)
    assert float(found.std()) == pytest.approx(S, rel=0.04)


@pytest.mark.parametrize("name", ["FlowEulerAncestral", "FlowLCM", "FlowDPMSolver2SAncestral"])
def test_noise_is_the_jobs_own(name: str) -> None:
    """The same seed draws the same noise at every step, whatever the process drew before."""
    first = run(solver(name), start(64), 8)
    torch.rand(7)
    assert torch.equal(run(solver(name), start(64), 8), first)
    other = solver(name)
    other.generator = torch.Generator().manual_seed(2)
    assert not torch.equal(run(other, start(64), 8), first)


def test_lcm_jumps_to_the_denoised_picture() -> None:
    """In a single step, LCM gives the very picture that the model predicts."""
    x = start(64)
    predicted = x - model(x, torch.tensor(1000.0))
    assert torch.allclose(run(solver("FlowLCM", shift=1.0), x, 1), predicted, atol=1e-6)
