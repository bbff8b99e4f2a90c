"""Samplers: the names of stable-diffusion.cpp, and that each solves what it says it solves.

The model here is one whose answer is known: for data that is Gaussian with standard deviation S, the best
denoiser of a noisy value is linear, and the way from noise to data has a closed form.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from studio_worker.engine.samplers import FLOW_SAMPLERS, SAMPLERS, make_scheduler, sampler
from studio_worker.engine.solvers import IPNDM, IPNDMVariable
from studio_worker.errors import JobError

torch.set_num_threads(1)

# diffusers meets numpy 2 in thousands of places that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

S = 0.5
ANCESTRAL = {"euler_a", "dpm++2s_a", "lcm"}
"""They draw noise as they go; tcd does so only with an eta that is never set here."""
NOT_CONSISTENT = {"tcd", "dpm++2mv2"}
"""tcd jumps, which only models distilled for it allow; dpm++2mv2 sharpens where log-noise steps are uneven.
"""


def shipped(prediction_type: str = "epsilon") -> EulerAncestralDiscreteScheduler:
    """Stable Diffusion's noise schedule, as a model's configuration would ship it."""
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing="linspace",
    )


def noise_levels() -> np.ndarray:
    """Sigma of every training timestep."""
    alphas = shipped().alphas_cumprod.double().numpy()
    return np.asarray(np.sqrt((1 - alphas) / alphas))


def model(z: torch.Tensor, timestep: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """The perfect model's output for its input ``z`` (which pipelines scale to unit variance)."""
    sigma = float(np.interp(float(timestep), np.arange(1000), noise_levels()))
    x = z * math.sqrt(1 + sigma**2)
    x0 = x * S**2 / (S**2 + sigma**2)
    noise = (x - x0) / sigma
    return noise if prediction_type == "epsilon" else (noise - sigma * x0) / math.sqrt(1 + sigma**2)


def run(
    scheduler: SchedulerMixin, start: torch.Tensor, steps: int, prediction_type: str = "epsilon"
) -> torch.Tensor:
    """What a pipeline does between noise and latents."""
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    x = start * scheduler.init_noise_sigma
    draws = "generator" in scheduler.step.__code__.co_varnames
    for timestep in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, timestep), timestep, prediction_type)
        more = {"generator": generator} if draws else {}
        if type(scheduler).__name__ == "TCDScheduler":
            more["eta"] = 0.0  # as the pipelines pass it
        x = scheduler.step(output, timestep, x, return_dict=False, **more)[0]
    return x


def start(count: int = 4096) -> torch.Tensor:
    return torch.randn(1, 1, 1, count, generator=torch.Generator().manual_seed(0))


def test_every_name_of_the_protocol_is_known() -> None:
    """Every sampler that the protocol lists can be asked for."""
    listed = "euler euler_a heun dpm2 dpm++2s_a dpm++2m dpm++2mv2 ipndm lcm ddim_trailing"
    assert set(listed.split()) <= set(SAMPLERS)


@pytest.mark.parametrize("name", ["", "Euler a", "k_euler", "res_2s", "unipc"])
def test_unknown_sampler_is_refused(name: str) -> None:
    """A sampler that is not here is an error that names those that are, and no other try will mend it."""
    with pytest.raises(JobError, match=r"known: euler, euler_a, .*tcd") as caught:
        sampler(name)
    assert not caught.value.retryable


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - ANCESTRAL - NOT_CONSISTENT))
def test_deterministic_sampler_finds_the_exact_answer(name: str, prediction_type: str) -> None:
    """Without drawn noise, every sampler ends where the closed form does, for both kinds of prediction."""
    scheduler = make_scheduler(name, shipped(prediction_type), 100)
    sigma = float(noise_levels()[-1])
    exact = start() * sigma * S / math.sqrt(S**2 + sigma**2)
    found = run(scheduler, start(), 100, prediction_type)
    assert float((found - exact).abs().max()) < 0.06 * float(exact.abs().max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["euler_a", "dpm++2s_a"])
def test_ancestral_sampler_keeps_the_distribution(name: str, prediction_type: str) -> None:
    """With noise drawn at every step, what comes out is still spread as the data is."""
    found = run(make_scheduler(name, shipped(prediction_type), 100), start(), 100, prediction_type)
    assert float(found.std()) == pytest.approx(S, rel=0.06)
    assert float(found.mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_few_and_many_steps_work(name: str) -> None:
    """Every sampler works with a single step and with the most that a task may ask for."""
    for steps in (1, 2, 3, 51, 150):
        scheduler = make_scheduler(name, shipped(), steps)
        assert torch.isfinite(run(scheduler, start(8), steps)).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_keeps_the_models_noise_schedule(name: str) -> None:
    """The noise schedule and prediction type are the model's own, whatever sampler is asked for."""
    config = make_scheduler(name, shipped("v_prediction"), 20).config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert config.prediction_type == "v_prediction"


def test_flow_models_know_the_same_names() -> None:
    """Every sampler that can be asked for with Stable Diffusion can be with flow models too."""
    assert set(FLOW_SAMPLERS) == set(SAMPLERS)


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_flow_shift_takes_the_place_of_the_shipped_one(name: str) -> None:
    """A given shift holds for every sampler, whatever the model ships and whatever the picture's size."""
    shipped = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler = make_scheduler(name, shipped, 4, flow=True, shift=3.0, generator=torch.Generator())
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.5)
    levels = [float(sigma) for sigma in scheduler.sigmas]
    assert {round(3 * s / (1 + 2 * s), 5) for s in (1.0, 0.75, 0.5, 0.25)} <= {round(s, 5) for s in levels}
    assert shipped.config.use_dynamic_shifting


def kdiffusion_2s_ancestral(x: torch.Tensor, sigmas: list[float], generator: torch.Generator) -> torch.Tensor:
    """DPM++ 2S a written out from the paper (Lu et al. 2022, algorithm 1, with ancestral noise)."""

    def x0(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * S**2 / (S**2 + sigma**2)

    for sigma, following in itertools.pairwise(sigmas):
        up = math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
        down = math.sqrt(following**2 - up**2)
        if down == 0:
            return x0(x, sigma)
        h = math.log(sigma) - math.log(down)
        middle = math.exp(math.log(sigma) - h / 2)
        half = (middle / sigma) * x - math.expm1(-h / 2) * x0(x, sigma)
        x = (down / sigma) * x - math.expm1(-h) * x0(half, middle)
        x = x + up * torch.randn(x.shape, generator=generator)
    return x


def test_dpm2s_ancestral_is_the_published_method() -> None:
    """dpm++2s_a takes the very steps of the published method, drawn noise included."""
    steps = 12
    scheduler = make_scheduler("dpm++2s_a", shipped(), steps)
    found = run(scheduler, start(64), steps)
    sigmas = [float(s) for s in np.interp(np.linspace(999, 0, steps), np.arange(1000), noise_levels())]
    expected = kdiffusion_2s_ancestral(
        start(64) * sigmas[0], [*sigmas, 0.0], torch.Generator().manual_seed(1)
    )
    # The model is asked at a timestep, so that the middle noise level is only as exact as the table of
    # levels.
    assert float((found - expected).abs().max()) < 2e-3


def test_dpm2m_v2_is_what_stable_diffusion_cpp_computes() -> None:
    """dpm++2mv2 takes the very steps that stable-diffusion.cpp's does."""
    steps = 12
    found = run(make_scheduler("dpm++2mv2", shipped(), steps), start(64), steps)
    levels = [float(s) for s in np.interp(np.linspace(999, 0, steps), np.arange(1000), noise_levels())]
    x, earlier = start(64) * levels[0], None
    for i, sigma in enumerate(levels[:-1]):
        x0 = x * S**2 / (S**2 + sigma**2)
        h = math.log(sigma / levels[i + 1])
        if earlier is None:
            change = -math.expm1(-h) * x0
        else:
            last = math.log(levels[i - 1] / sigma)
            r = max(h, last) / min(h, last)
            sharpened = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * earlier
            change = -math.expm1(-(h + last) / 2) * sharpened
        x, earlier = levels[i + 1] / sigma * x + change, x0
    expected = x * S**2 / (S**2 + levels[-1] ** 2)
    assert float((found - expected).abs().max()) < 1e-3


def test_variable_weights_are_the_fixed_ones_for_even_steps() -> None:
    """With even noise levels ipndm_v is ipndm, and its weights always add up to one."""
    even, uneven = [4.0, 5.0, 6.0, 7.0], [4.0, 6.0, 9.0, 14.0]
    for order in (1, 2, 3, 4):
        assert IPNDMVariable().weights(even[:order], 3.0) == pytest.approx(IPNDM.WEIGHTS[order - 1])
        assert sum(IPNDMVariable().weights(uneven[:order], 3.0)) == pytest.approx(1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_single_step_is_the_first_one(name: str) -> None:
    """A picture of one step, as turbo models make, starts at full noise and not at the last noise level."""
    scheduler = make_scheduler(name, shipped(), 1)
    scheduler.set_timesteps(1)
    assert float(scheduler.timesteps[0]) == pytest.approx(999, abs=21)  # 980: where LCM's own grid begins
