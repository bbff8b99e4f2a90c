"""A loaded model at work: prompts encoded, noise taken away by a diffusers pipeline, the picture decoded.

This module owns what all families have in common; what differs, each :class:`Family` says. A model is put
together for every job from components that residency keeps, which takes less than a millisecond.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image

from studio_worker.engine import Progress
from studio_worker.engine.compiling import compiled
from studio_worker.engine.families.family import Family, JobKind
from studio_worker.engine.loading import load_scheduler, load_tokenizer
from studio_worker.engine.offloading import placed
from studio_worker.engine.parameters import Parameters
from studio_worker.engine.placement import Mode, Plan
from studio_worker.engine.prompts import PromptCache
from studio_worker.engine.samplers import make_scheduler
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel

_ALL_THERE = Plan(Mode.WHOLE, tiled=False, peak_bytes=0)


@dataclass(frozen=True)
class Starting:
    """The pictures a job starts from: RGB and of its size, with a mask of mode L (255 = may change); or a
    reference picture (RGB) of its own size for an edit by instruction.
    """

    picture: Image.Image | None = None
    mask: Image.Image | None = None
    reference: Image.Image | None = None

    @property
    def kind(self) -> JobKind:
        """Which of a family's pipelines the job is for."""
        if self.reference is not None:
            return "edit"
        if self.picture is None:
            return "text"
        return "image" if self.mask is None else "inpaint"


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
        self._shipped = family.schedule(load_scheduler(family), parts)
        tokenizers = {name: load_tokenizer(each) for name, each in family.tokenizers.items()}
        self._components = family.assemble({**parts, **tokenizers, "scheduler": self._shipped})

    @torch.no_grad()
    def render(
        self, parameters: Parameters, starting: Starting, progress: Progress, cancel: Cancel
    ) -> Rendered:
        """Make one picture. ``progress`` is called and ``cancel`` checked at every model evaluation.

        Raises:
            JobError: the parameters ask for what this family cannot do.
            JobCancelled: ``cancel`` was set; the model stays usable.
        """
        family = self._family
        pipeline = self.pipeline(starting)
        # On the CPU whatever the device is: the same seed draws the same noise everywhere.
        generator = torch.Generator("cpu").manual_seed(parameters.seed)
        pipeline.scheduler = make_scheduler(
            parameters.sampler,
            self._shipped,
            parameters.steps,
            flow=family.flow,
            shift=None if parameters.flow_shift is None else family.shift(parameters.flow_shift),
            generator=generator,
        )

        def on_step_end(running: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress(step + 1, running.num_timesteps)
            cancel.check()  # raising is the one way out of a diffusers pipeline that does not decode first
            return tensors

        pictures = self._pictures(pipeline, parameters, starting)
        prepared = family.prepare(pipeline, parameters)
        with (
            placed(pipeline, self._plan, self._device),
            compiled(self._denoiser, is_offloaded=self._plan.mode is not Mode.WHOLE) as is_compiled,
        ):
            latents = pipeline(
                num_inference_steps=parameters.steps,
                generator=generator,
                output_type="latent",
                callback_on_step_end=on_step_end,
                **self._encoded(pipeline, parameters, starting),
                **family.guidance(parameters),
                **prepared,
                **pictures,
            ).images
            picture = self._decode(pipeline, latents, parameters)
        facts: dict[str, Any] = {"scheduler": type(pipeline.scheduler).__name__}
        if family.flow and parameters.flow_shift is not None:
            facts["flowShift"] = parameters.flow_shift
        if starting.reference is not None and getattr(self._denoiser, "zero_cond_t", False):
            facts["zeroCondT"] = True  # said by the source or by the file; without reference it does nothing
        if is_compiled:
            facts["compiled"] = True
        if self._plan.mode is not Mode.WHOLE:
            facts["offload"] = self._plan.mode.value
        if self._plan.tiled:
            facts["tiledVae"] = True
        read = [parameters.prompt, *([parameters.negative_prompt] if parameters.guidance > 1 else [])]
        if any(family.is_truncated(pipeline, text) for text in read):
            facts["promptTruncated"] = True
        return Rendered(picture, facts)

    def _encoded(self, pipeline: Any, parameters: Parameters, starting: Starting) -> dict[str, Any]:
        """The prompts as the family encodes them. An edit's depend on its picture, and are not kept."""

        def encode() -> dict[str, Any]:
            return self._family.encode(pipeline, parameters)

        if starting.reference is not None:
            return encode()
        words = (parameters.prompt, parameters.negative_prompt, parameters.guidance)
        return self._prompts.get((self._reads_by, words), self._device, encode)

    def lora_pipeline(self) -> Any:
        """A pipeline that LoRAs can be brought in through; the components are the same in all of them."""
        kinds = self._family.pipelines
        names = (kinds.text, kinds.edit, kinds.image, kinds.inpaint)
        return self._pipeline(next(name for name in names if name is not None))

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

    def _pictures(self, pipeline: Any, parameters: Parameters, starting: Starting) -> dict[str, Any]:
        """Sizes and pictures, as far as the pipeline takes them."""
        known = inspect.signature(pipeline.__call__).parameters
        arguments: dict[str, Any] = {"width": parameters.width, "height": parameters.height}
        if starting.reference is not None:
            arguments["image"] = starting.reference
        elif starting.picture is not None:
            arguments |= {"image": starting.picture, "strength": self._family.strength(parameters)}
            if starting.mask is not None:
                arguments["mask_image"] = starting.mask
        return {name: value for name, value in arguments.items() if name in known}

    def _decode(self, pipeline: Any, latents: torch.Tensor, parameters: Parameters) -> Image.Image:
        """The picture of ``latents`` as the pipeline gave them."""
        _check_finite(latents)
        vae = pipeline.vae
        held_as = vae.dtype
        # Many published checkpoints overflow half precision in the VAE's decoder and come out black.
        if held_as == torch.float16:
            vae.to(torch.float32)
        try:
            decodable = self._family.latents(pipeline, latents.to(vae.dtype), parameters)
            decoded = vae.decode(decodable, return_dict=False)[0]
        finally:
            if held_as == torch.float16:
                vae.to(held_as)
        decoded = decoded[:, :, 0] if decoded.ndim == 5 else decoded  # video VAEs: one frame
        _check_finite(decoded)
        picture: Image.Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture


def _check_finite(tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise JobError(
            "the model computed numbers that are not finite (NaN), which would be a black picture; "
            "its weights are damaged or overflow this device's precision"
        )
