"""Samplers: stable-diffusion.cpp's names, and the diffusers scheduler behind each.

This module owns the names a task may use, for models that predict noise and for those that predict a flow.
Every scheduler is made from the one the model's configuration ships, so that its noise schedule and
prediction type hold for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)

from studio_worker.engine.flow_solvers import (
    FlowDPM2,
    FlowDPMSolver2M,
    FlowDPMSolver2Mv2,
    FlowDPMSolver2SAncestral,
    FlowEulerAncestral,
    FlowHeun,
    FlowIPNDM,
    FlowIPNDMVariable,
    FlowLCM,
    FlowScheduler,
)
from studio_worker.engine.solvers import IPNDM, DPMSolver2Mv2, DPMSolver2SAncestral, IPNDMVariable
from studio_worker.errors import JobImpossible

_DISTILLED_STEPS = 50
"""Steps of the grid that LCM and TCD models were distilled on: both schedulers' own default."""


@dataclass(frozen=True)
class Sampler:
    """The scheduler behind one of stable-diffusion.cpp's names.

    Every one is the published method of that name. ``differs`` says where it is not, number for number, what
    stable-diffusion.cpp computes; the noise itself differs in any case, since the random generators do.
    """

    scheduler: type[SchedulerMixin]
    options: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""


SAMPLERS: Mapping[str, Sampler] = {
    "euler": Sampler(EulerDiscreteScheduler),
    "euler_a": Sampler(EulerAncestralDiscreteScheduler),
    "heun": Sampler(HeunDiscreteScheduler),
    "dpm2": Sampler(KDPM2DiscreteScheduler),
    "dpm++2s_a": Sampler(
        DPMSolver2SAncestral, differs="the middle evaluation is told its own noise level, not the next step's"
    ),
    "dpm++2m": Sampler(
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
        differs="even steps over one more point, of which the last is left out",
    ),
    "dpm++2mv2": Sampler(DPMSolver2Mv2),
    "ipndm": Sampler(IPNDM),
    "ipndm_v": Sampler(IPNDMVariable, differs="weights follow uneven noise levels at orders 3 and 4 too"),
    "lcm": Sampler(LCMScheduler, differs="the paper's timesteps and boundary scalings"),
    "ddim_trailing": Sampler(
        DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
    ),
    "tcd": Sampler(TCDScheduler, differs="the paper's timesteps"),
}

FLOW_SAMPLERS: Mapping[str, Sampler] = {
    "euler": Sampler(FlowMatchEulerDiscreteScheduler),
    "euler_a": Sampler(FlowEulerAncestral),
    "heun": Sampler(FlowHeun),
    "dpm2": Sampler(FlowDPM2),
    "dpm++2s_a": Sampler(FlowDPMSolver2SAncestral),
    "dpm++2m": Sampler(FlowDPMSolver2M),
    "dpm++2mv2": Sampler(FlowDPMSolver2Mv2),
    "ipndm": Sampler(FlowIPNDM),
    "ipndm_v": Sampler(FlowIPNDMVariable, differs="weights follow uneven noise levels at orders 3 and 4 too"),
    "lcm": Sampler(FlowLCM),
    "ddim_trailing": Sampler(
        FlowMatchEulerDiscreteScheduler, differs="on a flow, DDIM's step without noise is Euler's"
    ),
    "tcd": Sampler(
        FlowMatchEulerDiscreteScheduler, differs="on a flow, TCD's step with eta 0, the default, is Euler's"
    ),
}


def sampler(name: str, *, flow: bool = False) -> Sampler:
    """
    Args:
        flow: whether the model predicts a flow.

    Raises:
        JobImpossible: no sampler of that name.
    """
    known = FLOW_SAMPLERS if flow else SAMPLERS
    if name in known:
        return known[name]
    raise JobImpossible(f"unknown samplingMethod {name!r}; known: {', '.join(known)}")


def make_scheduler(
    name: str,
    shipped: SchedulerMixin,
    steps: int,
    *,
    flow: bool = False,
    shift: float | None = None,
    generator: torch.Generator | None = None,
) -> SchedulerMixin:
    """The scheduler for ``steps`` steps of the sampler ``name``, on the noise schedule of ``shipped``.

    Args:
        flow: whether the model predicts a flow.
        shift: for flows: how noise levels are shifted, in place of what ``shipped`` says.
        generator: for flows: where noise is drawn from during the steps.
    """
    chosen = sampler(name, flow=flow)
    options = dict(chosen.options)
    if steps == 1 and not flow:
        options["timestep_spacing"] = (
            "trailing"  # evenly spaced, a single step would be the last, not the first
        )
    if chosen.scheduler in (LCMScheduler, TCDScheduler):
        # More steps than the grid has points would be refused; the grid grows with them.
        options["original_inference_steps"] = max(_DISTILLED_STEPS, steps)
    if flow and shift is not None:
        # One shift for all sizes of picture, as stable-diffusion.cpp's --flow-shift.
        options |= {"shift": shift, "use_dynamic_shifting": False, "shift_terminal": None}
    scheduler = chosen.scheduler.from_config(shipped.config, **options)
    if isinstance(scheduler, FlowScheduler):
        scheduler.generator = generator
    return scheduler
