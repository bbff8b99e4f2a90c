"""Which parameter wins, and which are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio_worker.engine.parameters import (
    MAX_GUIDANCE,
    MAX_PIXELS,
    MAX_SEED,
    MAX_SIDE_PX,
    MAX_STEPS,
    MIN_SIDE_PX,
    EngineDefaults,
    Parameters,
    resolve,
)
from studio_worker.errors import JobError
from studio_worker.jobs import ImageTask
from studio_worker.models import CliDefaults

ENGINE = EngineDefaults()

sides = st.integers(MIN_SIDE_PX, 2048)
steps = st.integers(1, MAX_STEPS)
guidances = st.floats(0.1, MAX_GUIDANCE)


def decide(task: dict[str, Any], model: dict[str, Any] | None = None, **more: Any) -> Parameters:
    return resolve(
        ImageTask(prompt="p", **task), CliDefaults(**(model or {})), ENGINE, from_image=False, **more
    )


def first(*values: int | float | None) -> int | float | None:
    return next((value for value in values if value), None)


@settings(deadline=None)  # a busy machine is not a failure
@given(
    own=st.fixed_dictionaries(
        {},
        optional={
            "steps": st.just(0) | steps,
            "cfg_scale": st.just(0.0) | guidances,
            "width": st.just(0) | sides,
            "height": st.just(0) | sides,
        },
    ),
    model=st.fixed_dictionaries(
        {}, optional={"steps": steps, "cfg_scale": guidances, "width": sides, "height": sides}
    ),
)
def test_precedence_is_task_then_model_then_engine(own: dict[str, Any], model: dict[str, Any]) -> None:
    """A value that the task gives wins over the model's, and the model's over the engine's."""
    parameters = decide(own, model)

    task_steps = None if own.get("steps") == 20 else own.get("steps")
    assert parameters.steps == first(task_steps, model.get("steps"), ENGINE.steps)
    assert parameters.guidance == first(own.get("cfg_scale"), model.get("cfg_scale"), ENGINE.guidance)
    for name in ("width", "height"):
        asked = first(own.get(name), model.get(name), getattr(ENGINE, name))
        assert 0 <= getattr(parameters, name) - asked < ENGINE.size_multiple


def test_steps_of_exactly_twenty_count_as_not_given() -> None:
    """The studio's own default of 20 steps gives way to the model's, and stands where the model has none."""
    assert decide({"steps": 20}, {"steps": 8}).steps == 8
    assert decide({"steps": 20}).steps == 20
    assert decide({"steps": 21}, {"steps": 8}).steps == 21


def test_sampler_precedence_is_the_same() -> None:
    """The task's sampler wins over the model's; without either it is stable-diffusion.cpp's euler_a."""
    assert decide({"sampling_method": "lcm"}, {"sampling_method": "heun"}).sampler == "lcm"
    assert decide({}, {"sampling_method": "heun"}).sampler == "heun"
    assert decide({}).sampler == "euler_a"


@settings(deadline=None)
@given(width=sides, height=sides, multiple=st.sampled_from([1, 8, 16, 64]))
def test_sizes_are_the_next_multiple(width: int, height: int, multiple: int) -> None:
    """Sizes become the next larger multiple that the family works in, as stable-diffusion.cpp's do."""
    parameters = resolve(
        ImageTask(prompt="", width=width, height=height),
        CliDefaults(),
        EngineDefaults(size_multiple=multiple),
        from_image=False,
    )
    for asked, used in ((width, parameters.width), (height, parameters.height)):
        assert used % multiple == 0
        assert 0 <= used - asked < multiple


@pytest.mark.parametrize(("given", "used"), [(None, None), (0.0, None), (3.0, 3.0)])
def test_flow_shift_is_the_models(given: float | None, used: float | None) -> None:
    """flowShift comes from the model; where it says nothing, the family's own holds."""
    assert decide({}, {"flow_shift": given}).flow_shift == used


@pytest.mark.parametrize("shift", [-1.0, math.nan, math.inf, 1000.0])
def test_impossible_flow_shift_is_refused(shift: float) -> None:
    """A flowShift that no schedule survives is refused with its limits."""
    with pytest.raises(JobError, match="flowShift") as caught:
        decide({}, {"flow_shift": shift})
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "task",
    [
        {"width": MIN_SIDE_PX - 1},
        {"height": MAX_SIDE_PX + 1},
        {"width": MAX_SIDE_PX, "height": MAX_PIXELS // MAX_SIDE_PX + 8},
        {"steps": MAX_STEPS + 1},
        {"cfg_scale": -1.0},
        {"cfg_scale": MAX_GUIDANCE + 1},
        {"cfg_scale": math.nan},
        {"cfg_scale": math.inf},
        {"seed": MAX_SEED + 1},
    ],
)
def test_value_outside_its_limits_is_refused(task: dict[str, Any]) -> None:
    """A value outside its limits is an error that names it, and no other try will mend it."""
    with pytest.raises(JobError, match="bad parameters") as caught:
        decide(task)
    assert not caught.value.retryable


@settings(deadline=None)
@given(st.integers(0, MAX_SEED))
def test_given_seed_is_used(seed: int) -> None:
    """The seed that a task gives is the seed that is used."""
    assert decide({"seed": seed}).seed == seed


@settings(deadline=None)
@given(st.none() | st.integers(-(2**64), -1))
def test_absent_or_negative_seed_is_drawn(seed: int | None) -> None:
    """Without a seed, or with a negative one, a fresh one is drawn that any JSON reader keeps exact."""
    assert 0 <= decide({"seed": seed}).seed < 2**53


def test_drawn_seeds_differ() -> None:
    """Two jobs without seed do not get the same picture."""
    assert len({decide({}).seed for _ in range(20)}) > 10


def test_denoise_means_nothing_without_initial_picture() -> None:
    """A text-to-image picture carries no denoising strength."""
    task = ImageTask(prompt="", denoise=0.3)
    assert resolve(task, CliDefaults(), ENGINE, from_image=False).denoise is None
    assert resolve(task, CliDefaults(), ENGINE, from_image=True).denoise == 0.3


@settings(deadline=None)
@given(st.text(st.characters()))
def test_any_prompt_becomes_valid_text(prompt: str) -> None:
    """A prompt with lone surrogates, which JSON can carry, does not break what comes after."""
    task = ImageTask.model_construct(prompt=prompt, negative_prompt=prompt)
    parameters = resolve(task, CliDefaults(), ENGINE, from_image=False)
    assert len(parameters.prompt.encode()) >= len(prompt)
    assert parameters.negative_prompt == parameters.prompt
