"""Samplers: the names of stable-diffusion.cpp, its noise levels and noise, and that each solves what it says.

The model here is one whose answer is known: for data that is Gaussian with standard deviation S, the best
denoiser of a noisy value is linear, and the way from noise to data has a closed form.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from studio_worker.engine.sampling.denoising import asking, denoise, drawn, evaluations, noised
from studio_worker.engine.sampling.levels import Diffusion, Flow, Scale, steps_from_picture
from studio_worker.engine.sampling.noise import Noise, normal
from studio_worker.engine.sampling.samplers import SAMPLERS, noise_levels, sampler
from studio_worker.engine.sampling.solvers import Course
from studio_worker.errors import JobError

torch.set_num_threads(1)

DATA = Path(__file__).parents[2] / "data"
"""What stable-diffusion.cpp (master-669-2d40a8b) printed: noise, and noise levels by model and sampler."""

S = 0.5
ANCESTRAL = ("euler_a", "dpm++2s_a", "er_sde")
"""They draw noise as they go, and keep the distribution."""
LOOSE = ("lcm", "tcd", "dpm++2mv2", "euler_a_cfg_pp")
"""lcm and tcd jump, which only models distilled for it allow; dpm++2mv2 sharpens where log-level steps are
uneven; euler_a_cfg_pp draws a flow's noise as other models' is drawn.
"""
EXACT = tuple(sorted(set(SAMPLERS) - set(ANCESTRAL) - set(LOOSE)))


def diffusion(*, predicts_v: bool = False) -> Diffusion:
    """Stable Diffusion's noise schedule."""
    schedule = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Diffusion(tuple(schedule.alphas_cumprod.tolist()), predicts_v)


SCALES: dict[str, Scale] = {
    "noise": diffusion(),
    "v": diffusion(predicts_v=True),
    "flow": Flow(3.0),
}


def model(scale: Scale, z: torch.Tensor, level: float) -> torch.Tensor:
    """The perfect model's output for its input ``z`` at a noise level."""
    kept, fresh = scale.weights(level)
    x = z / scale.input_scale(level)
    picture = x * kept * S**2 / ((kept * S) ** 2 + fresh**2)
    of_x, of_output = scale.denoised_weights(level)
    return (picture - x * of_x) / of_output


def run(
    name: str, scale: Scale, x: torch.Tensor, steps: int, denoise_: float | None = None, seed: int = 1
) -> torch.Tensor:
    """What a job does between noise and latents; ``x`` is noise of deviation 1, or the picture's own."""
    levels = noise_levels(name, scale, steps, denoise_)
    noise = Noise(seed)

    def predict(z: torch.Tensor, timestep: float) -> list[torch.Tensor]:
        level = timestep / 1000 if scale.is_flow else scale.level(timestep)
        return [model(scale, z, level)]

    course = Course(levels, scale.is_flow, lambda: drawn(noise, x))
    begun = noised(scale, levels[0], torch.zeros_like(x), x)
    return denoise(sampler(name).solver, course, begun, asking(scale, predict, 1.0), lambda *_: None)


def start(count: int = 4096) -> torch.Tensor:
    return torch.randn(1, 1, 1, count, generator=torch.Generator().manual_seed(0))


def exact(scale: Scale, x: torch.Tensor) -> torch.Tensor:
    """Where the closed form ends that begins at noise ``x``."""
    kept, fresh = scale.weights(scale.level(999))
    return x * fresh * S / math.sqrt((kept * S) ** 2 + fresh**2)


# --- names, noise and noise levels ---


def test_every_name_of_stable_diffusion_cpp_is_known() -> None:
    """Every sampler that the protocol lists, and every other of stable-diffusion.cpp's, can be asked for."""
    listed = "euler euler_a heun dpm2 dpm++2s_a dpm++2m dpm++2mv2 ipndm lcm ddim_trailing"
    further = "ipndm_v tcd res_multistep res_2s er_sde euler_cfg_pp euler_a_cfg_pp euler_ge"
    assert set(SAMPLERS) >= set(listed.split()) | set(further.split())


@pytest.mark.parametrize("name", ["", "Euler a", "k_euler", "unipc"])
def test_unknown_sampler_is_refused(name: str) -> None:
    """A sampler that is not here is an error that names those that are, and no other try will mend it."""
    with pytest.raises(JobError, match=r"known: euler, euler_a, .*tcd") as caught:
        sampler(name)
    assert caught.value.is_jobs_fault


def test_noise_is_stable_diffusion_cpps() -> None:
    """Every seed and draw gives the numbers that stable-diffusion.cpp draws, wherever in it they stand."""
    for case in json.loads((DATA / "sd-cpp-noise.json").read_text()):
        numbers = normal(case["seed"], case["draw"], 256)
        assert numbers[:8] == pytest.approx(np.array(case["first"]), abs=2e-6)
        assert numbers[-2:] == pytest.approx(np.array(case["last_of_256"]), abs=2e-6)


def test_noise_is_normal_whatever_its_size() -> None:
    """A large draw is spread as normal numbers are, begins as a small one does, and every draw is another."""
    noise = Noise(2**64 - 1)
    first, second = noise.draw((16, 128, 129)), noise.draw((16, 128, 129))
    assert (first.ravel()[:100] == normal(2**64 - 1, 0, 100)).all()
    for each in (first, second):
        assert np.isfinite(each).all()
        assert float(each.mean()) == pytest.approx(0, abs=0.01)
        assert float(each.std()) == pytest.approx(1, abs=0.01)
    assert abs(float((first * second).mean())) < 0.01


def test_noise_levels_are_stable_diffusion_cpps() -> None:
    """Every kind of model goes through the noise levels that stable-diffusion.cpp prints."""
    for case, printed in json.loads((DATA / "sd-cpp-levels.json").read_text()).items():
        words = case.split()
        kind, steps = words[0], int(words[-2])
        scale: Scale = diffusion()
        if kind != "sd1":
            is_logarithm = kind.startswith(("flux", "chroma"))
            scale = Flow(math.exp(printed["shift"]) if is_logarithm else printed["shift"])
        name = words[1] if kind == "sd1" else "euler"
        # Four digits were printed.
        assert noise_levels(name, scale, steps) == pytest.approx(printed["levels"], rel=6e-4), case


def test_distilled_levels_of_flows_are_stable_diffusion_cpps() -> None:
    """lcm goes through the grid that such models were distilled on, on flows too."""
    expected = [1.0, 0.904761905, 0.75, 0.513157895, 0.0]  # printed by a run of Z-Image
    assert noise_levels("lcm", Flow(3.0), 4) == pytest.approx(expected)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_timestep_of_a_level_is_where_the_level_came_from(scale: Scale) -> None:
    """What a denoiser is told for a noise level is the timestep that the level stands for."""
    for timestep in (0.0, 0.4, 250.0, 499.5, 998.9, 999.0):
        shown = scale.level(timestep) * 1000 if scale.is_flow else timestep
        assert scale.timestep(scale.level(timestep)) == pytest.approx(shown, abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "denoise_", "run_"), [(20, 0.75, 16), (8, 0.75, 7), (4, 0.5, 3), (4, 1.0, 4), (10, 0.999, 10)]
)
def test_steps_from_a_picture_are_stable_diffusion_cpps(steps: int, denoise_: float, run_: int) -> None:
    """Of a job that starts from a picture, as many steps run as stable-diffusion.cpp runs."""
    assert steps_from_picture(steps, denoise_) == run_
    assert len(noise_levels("euler", Flow(3.0), steps, denoise_)) == run_ + 1


@settings(deadline=None)
@given(steps=st.integers(1, 150), denoise_=st.floats(0, 1, exclude_min=True))
def test_denoise_always_leaves_a_step(steps: int, denoise_: float) -> None:
    """However little denoise of however few steps is asked for, one step is made, and never more than all."""
    assert 1 <= steps_from_picture(steps, denoise_) <= steps


# --- solvers ---


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", EXACT)
def test_deterministic_sampler_finds_the_exact_answer(name: str, kind: str) -> None:
    """Without drawn noise, every sampler ends where the closed form does, whatever its model predicts."""
    scale = SCALES[kind]
    expected = exact(scale, start())
    found = run(name, scale, start(), 100)
    assert float((found - expected).abs().max()) < 0.06 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["heun", "dpm2", "res_2s", "ipndm"])
def test_higher_order_sampler_is_nearer_than_euler(name: str) -> None:
    """A sampler that asks more of the model, or looks back, ends nearer to the closed form than Euler's."""
    scale = SCALES["flow"]
    errors = {
        each: float((run(each, scale, start(), 30) - exact(scale, start())).abs().max())
        for each in ("euler", name)
    }
    assert errors[name] < errors["euler"]


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", ANCESTRAL)
def test_ancestral_sampler_keeps_the_distribution(name: str, kind: str) -> None:
    """With noise drawn at every step, what comes out is still spread as the data is."""
    found = run(name, SCALES[kind], start(), 300)
    assert float(found.std()) == pytest.approx(S, rel=0.06)
    assert float(found.mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_few_and_many_steps_work(name: str, kind: str) -> None:
    """Every sampler works with a single step and with the most that a task may ask for, whole or in part."""
    for steps, part in itertools.product((1, 2, 3, 51, 150), (None, 0.01, 0.5)):
        assert torch.isfinite(run(name, SCALES[kind], start(8), steps, part)).all()


@pytest.mark.parametrize("name", ["euler_a", "dpm++2s_a", "lcm", "er_sde", "euler_a_cfg_pp"])
def test_noise_is_the_seeds(name: str) -> None:
    """The same seed draws the same noise at every step, whatever was drawn before; another seed does not."""
    first = run(name, SCALES["flow"], start(64), 8)
    torch.rand(7)
    assert torch.equal(run(name, SCALES["flow"], start(64), 8), first)
    assert not torch.equal(run(name, SCALES["flow"], start(64), 8, seed=2), first)


def test_evaluations_are_known_before_the_first() -> None:
    """How often a sampler asks the model is known beforehand, for those that ask twice a step too."""

    def count(name: str, scale: Scale = SCALES["noise"], steps: int = 4) -> int:
        levels = noise_levels(name, scale, steps)
        return evaluations(sampler(name).solver, Course(levels, scale.is_flow, lambda: 0.0))

    assert {name: count(name) for name in ("euler", "lcm", "heun", "dpm2", "dpm++2s_a", "res_2s")} == {
        "euler": 4,
        "lcm": 4,
        "heun": 7,
        "dpm2": 7,
        "dpm++2s_a": 7,
        "res_2s": 7,
    }
    assert count("dpm++2s_a", SCALES["flow"]) == 6  # at full noise a flow has nothing to look at twice


def published_2s_ancestral(x: torch.Tensor, levels: list[float], noise: Noise) -> torch.Tensor:
    """DPM++ 2S a written out from the paper (Lu et al. 2022, algorithm 1, with ancestral noise)."""

    def picture(x: torch.Tensor, level: float) -> torch.Tensor:
        return x * S**2 / (S**2 + level**2)

    for level, following in itertools.pairwise(levels):
        up = math.sqrt(following**2 * (level**2 - following**2) / level**2)
        down = math.sqrt(following**2 - up**2)
        if down == 0:
            return picture(x, level)
        h = math.log(level) - math.log(down)
        middle = math.exp(math.log(level) - h / 2)
        half = (middle / level) * x - math.expm1(-h / 2) * picture(x, level)
        x = (down / level) * x - math.expm1(-h) * picture(half, middle)
        x = x + up * drawn(noise, x)
    return x


def test_dpm2s_ancestral_is_the_published_method() -> None:
    """dpm++2s_a takes the very steps of the published method, drawn noise included."""
    levels = noise_levels("dpm++2s_a", SCALES["noise"], 12)
    expected = published_2s_ancestral(start(64) * levels[0], levels, Noise(1))
    assert torch.allclose(run("dpm++2s_a", SCALES["noise"], start(64), 12), expected, atol=1e-4)


def test_dpm2m_v2_is_the_published_method() -> None:
    """dpm++2mv2 takes the very steps of its proposal: 2M's, over the mean of the last two log-level steps."""
    levels = noise_levels("dpm++2mv2", SCALES["noise"], 12)
    x, earlier = start(64) * levels[0], None
    for i, level in enumerate(levels[:-2]):
        picture = x * S**2 / (S**2 + level**2)
        h = math.log(level / levels[i + 1])
        if earlier is None:
            change = -math.expm1(-h) * picture
        else:
            last = math.log(levels[i - 1] / level)
            r = max(h, last) / min(h, last)
            sharpened = (1 + 1 / (2 * r)) * picture - 1 / (2 * r) * earlier
            change = -math.expm1(-(h + last) / 2) * sharpened
        x, earlier = levels[i + 1] / level * x + change, picture
    expected = x * S**2 / (S**2 + levels[-2] ** 2)
    assert torch.allclose(run("dpm++2mv2", SCALES["noise"], start(64), 12), expected, atol=1e-4)


def test_cfg_pp_puts_the_negative_prompts_noise_back() -> None:
    """Each step of euler_cfg_pp ends at the guided picture, with the negative prompt's noise put back."""
    levels = [2.0, 0.5, 0.0]
    x = torch.tensor([3.0])

    def predict(z: torch.Tensor, _: float) -> list[torch.Tensor]:
        return [torch.full_like(z, 0.2), torch.full_like(z, 0.4)]  # noise for the prompt and the negative one

    found = denoise(
        sampler("euler_cfg_pp").solver,
        Course(levels, is_flow=False, noise=lambda: 0.0),
        x,
        asking(SCALES["noise"], predict, 3.0),
        lambda *_: None,
    )
    guided = 0.4 + 3.0 * (0.2 - 0.4)
    first = (3.0 - 2.0 * guided) + 0.4 * 0.5
    assert float(found) == pytest.approx(first - 0.5 * guided)


def test_guidance_below_one_mixes_the_negative_prompt_in() -> None:
    """A guidance between 0 and 1 gives what lies between both prompts' predictions."""

    def predict(z: torch.Tensor, _: float) -> list[torch.Tensor]:
        return [torch.full_like(z, 1.0), torch.full_like(z, 3.0)]

    answer = asking(Flow(3.0), predict, 0.25)(torch.zeros(1), 1.0)
    assert float(answer.picture) == pytest.approx(-(3.0 + 0.25 * (1.0 - 3.0)))
    assert float(answer.negative) == pytest.approx(-3.0)
