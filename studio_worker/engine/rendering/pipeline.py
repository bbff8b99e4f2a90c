"""A loaded model at work: prompts encoded, noise taken away by a diffusers pipeline, the picture decoded.

This module owns what all families have in common; what differs, each :class:`Family` says. A model is put
together for every job from components that residency keeps, which takes less than a millisecond.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image

from studio_worker.engine.contract import StepProgress
from studio_worker.engine.families.family import Family
from studio_worker.engine.loading import load_scheduler, load_tokenizer
from studio_worker.engine.memory.offloading import Bring, placed
from studio_worker.engine.memory.placement import Mode, Plan
from studio_worker.engine.parameters import Parameters
from studio_worker.engine.rendering.canvas import Canvas, Starting, check_finite, wide_enough
from studio_worker.engine.rendering.compiling import compiled
from studio_worker.engine.rendering.life import watched
from studio_worker.engine.rendering.prompts import PromptCache
from studio_worker.engine.sampling.denoising import asking, denoise, drawn, noised
from studio_worker.engine.sampling.noise import Noise
from studio_worker.engine.sampling.samplers import noise_levels, sampler
from studio_worker.engine.sampling.solvers import Course
from studio_worker.jobs import Cancel

CONVENTIONS = "stable-diffusion.cpp master-669-2d40a8b"
"""Whose noise, noise levels, starts and prompt weights make a picture: the same for the same seed."""

_ALL_THERE = Plan(Mode.WHOLE, tiled=False, peak_bytes=0)


@dataclass(frozen=True)
class Rendered:
    """A picture (RGB) and facts about its making that belong into ``generationMeta``."""

    picture: Image.Image
    facts: Mapping[str, Any] = field(default_factory=dict)


class LoadedModel:
    """The components of one model on their device.

    Args:
        family: how they work together.
        parts: the loaded components by the names that the family's pipelines give them.
        plan: how they come to their device; by default they are there.
        prompts: where encoded prompts are kept between jobs.
        reads_by: what tells apart models that make different embeddings of one prompt.
    """

    def __init__(
        self,
        family: Family,
        parts: Mapping[str, torch.nn.Module | None],
        plan: Plan = _ALL_THERE,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
        prompts: PromptCache | None = None,
        reads_by: Hashable = None,
    ) -> None:
        self._prompts = prompts or PromptCache(budget_bytes=0)
        self._reads_by = reads_by
        self._family = family
        self._plan = plan
        self._device = device
        self._denoiser = parts[family.denoiser]
        self.parts = parts
        self._shipped = load_scheduler(family)
        tokenizers = {name: load_tokenizer(each) for name, each in family.tokenizers.items()}
        self._components = family.assemble({**parts, **tokenizers, "scheduler": self._shipped})

    @torch.no_grad()
    def render(
        self, parameters: Parameters, starting: Starting, progress: StepProgress, cancel: Cancel
    ) -> Rendered:
        """Make one picture. ``progress`` is called and ``cancel`` checked at every model evaluation, and
        after each layer of what is no denoiser.

        Raises:
            JobError: the parameters ask for what this family cannot do.
            JobCancelled: ``cancel`` was set; the model stays usable.
        """
        family = self._family
        pipeline = self.pipeline(starting)
        scale = family.scale(self._shipped, self.parts, parameters.flow_shift)
        levels = noise_levels(parameters.sampler, scale, parameters.steps, parameters.denoise)

        def on_evaluation(done: int, total: int) -> None:
            progress(done, total)
            cancel.check()

        others = [part for name, part in self.parts.items() if part is not None and name != family.denoiser]

        with (
            watched(others, lambda: on_evaluation(0, parameters.steps)),
            placed(self.parts, self._plan, self._device) as bring,
            compiled(self._denoiser, is_offloaded=self._plan.mode is not Mode.WHOLE) as is_compiled,
        ):
            prompts = self._encoded(pipeline, parameters, starting)
            if starting.kind != "text":
                bring(pipeline.vae)
            canvas = Canvas(family, pipeline.vae, parameters, starting, self._device)
            arguments = family.prepare(pipeline, parameters, canvas.seen, prompts, self._device)
            noise = Noise(parameters.seed)
            picture = canvas.picture
            x = noised(scale, levels[0], picture, drawn(noise, picture))

            def predict(model_input: torch.Tensor, timestep: float) -> Sequence[torch.Tensor]:
                return family.predict(pipeline, model_input, timestep, arguments)

            latents = denoise(
                sampler(parameters.sampler).solver,
                Course(levels, scale.is_flow, lambda: drawn(noise, x)),
                x,
                asking(scale, predict, parameters.guidance, canvas.kept),
                on_evaluation,
            )
            made = self._decode(pipeline, latents, bring)
        facts = self._facts(pipeline, parameters, starting, len(levels) - 1)
        if is_compiled:
            facts["compiled"] = True
        return Rendered(made, facts)

    def _facts(
        self, pipeline: Any, parameters: Parameters, starting: Starting, steps_run: int
    ) -> dict[str, Any]:
        """What ``generationMeta`` says of the making."""
        family = self._family
        facts: dict[str, Any] = {"conventions": CONVENTIONS, "stepsRun": steps_run}
        if family.flow:
            given = parameters.flow_shift
            facts["flowShift"] = family.flow_shift if given is None else given
        if starting.reference is not None and getattr(self._denoiser, "zero_cond_t", False):
            facts["zeroCondT"] = True  # said by the source or by the file; without reference it does nothing
        if self._plan.mode is not Mode.WHOLE:
            facts["offload"] = self._plan.mode.value
        if self._plan.tiled:
            facts["tiledVae"] = True
        read = [parameters.prompt, *([parameters.negative_prompt] if parameters.guidance != 1 else [])]
        if any(family.is_truncated(pipeline, text) for text in read):
            facts["promptTruncated"] = True
        return facts

    def _encoded(self, pipeline: Any, parameters: Parameters, starting: Starting) -> dict[str, Any]:
        """The prompts as the family encodes them. An edit's depend on its picture, and are not kept."""

        def encode() -> dict[str, Any]:
            return self._family.encode(pipeline, parameters, self._device, starting.reference)

        if starting.reference is not None:
            return encode()
        words = (parameters.prompt, parameters.negative_prompt, parameters.guidance != 1)
        return self._prompts.get((self._reads_by, words), self._device, encode)

    def pipeline(self, starting: Starting) -> Any:
        """The diffusers pipeline for a job, over this model's components.

        Raises:
            JobError: the family has none for it.
        """
        return self._pipeline(self._family.pipeline_class(starting.kind))

    def _pipeline(self, name: str) -> Any:
        cls = getattr(diffusers, name)
        known = inspect.signature(cls.__init__).parameters
        given = {**self._components, **self._family.fixed}
        pipeline = cls(**{key: value for key, value in given.items() if key in known})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _decode(self, pipeline: Any, latents: torch.Tensor, bring: Bring) -> Image.Image:
        """The picture of ``latents``."""
        check_finite(latents)
        vae = pipeline.vae
        bring(vae)
        with wide_enough(vae):
            decoded = vae.decode(self._family.decodable(vae, latents).to(vae.dtype), return_dict=False)[0]
        decoded = decoded[:, :, 0] if decoded.ndim == 5 else decoded  # video VAEs: one frame
        check_finite(decoded)
        picture: Image.Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture
