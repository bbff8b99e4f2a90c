"""Stable Diffusion: a checkpoint in one file, loaded offline into a diffusers pipeline, and its pictures.

This module owns everything that holds for this family alone. The pipeline's configuration comes from a
folder that this package carries; the hub is never asked, because ``config`` is always a folder
(``config=None`` would ask it even with ``local_files_only``).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from studio_worker.engine import Progress
from studio_worker.engine.checkpoint import Checkpoint
from studio_worker.engine.parameters import Parameters
from studio_worker.engine.rendering import Rendered, Starting
from studio_worker.engine.samplers import make_scheduler, sampler
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel

_PARTS = ("text_encoder", "unet", "vae")


class StableDiffusion:
    """A Stable Diffusion model on its device; text-to-image, image-to-image and inpainting on one set of
    weights.
    """

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self._shipped_scheduler = pipeline.scheduler
        self._from_text = pipeline
        self._from_picture = StableDiffusionImg2ImgPipeline(
            **pipeline.components, requires_safety_checker=False
        )
        self._inside_mask = StableDiffusionInpaintPipeline(
            **pipeline.components, requires_safety_checker=False
        )
        for variant in (self._from_text, self._from_picture, self._inside_mask):
            variant.set_progress_bar_config(disable=True)

    def modules(self) -> Iterable[torch.nn.Module]:
        return [getattr(self._from_text, part) for part in _PARTS]

    def render(
        self, parameters: Parameters, starting: Starting, progress: Progress, cancel: Cancel
    ) -> Rendered:
        """See :meth:`studio_worker.engine.rendering.LoadedModel.render`."""
        sampler(parameters.sampler)
        pipeline, inputs = self._variant(parameters, starting)
        pipeline.scheduler = make_scheduler(parameters.sampler, self._shipped_scheduler, parameters.steps)

        def on_step_end(running: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress(step + 1, running.num_timesteps)
            cancel.check()  # raising is the one way out of a diffusers pipeline that does not decode first
            return tensors

        latents = pipeline(
            prompt=parameters.prompt,
            negative_prompt=parameters.negative_prompt,
            num_inference_steps=parameters.steps,
            guidance_scale=parameters.guidance,
            # On the CPU whatever the device is: the same seed draws the same noise everywhere.
            generator=torch.Generator("cpu").manual_seed(parameters.seed),
            output_type="latent",
            callback_on_step_end=on_step_end,
            **inputs,
        ).images
        facts: dict[str, Any] = {"scheduler": type(pipeline.scheduler).__name__}
        if any(map(self._is_truncated, (parameters.prompt, parameters.negative_prompt))):
            facts["promptTruncated"] = True
        return Rendered(self._decode(latents), facts)

    def _variant(self, parameters: Parameters, starting: Starting) -> tuple[Any, dict[str, Any]]:
        """The pipeline for the job, and the arguments that only it takes."""
        size = {"width": parameters.width, "height": parameters.height}
        if starting.picture is None or parameters.denoise is None:
            return self._from_text, size
        image = {"image": starting.picture, "strength": strength(parameters.steps, parameters.denoise)}
        if starting.mask is None:
            return self._from_picture, image
        return self._inside_mask, image | size | {"mask_image": starting.mask}

    def _is_truncated(self, text: str) -> bool:
        """Whether the text encoder's window is too short for ``text``."""
        tokenizer = self._from_text.tokenizer
        return bool(len(tokenizer(text, verbose=False).input_ids) > tokenizer.model_max_length)

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> Image.Image:
        """The picture of ``latents`` (1, channels, height / factor, width / factor)."""
        _check_finite(latents)
        vae = self._from_text.vae
        held_as = vae.dtype
        # Many published checkpoints overflow half precision in the VAE's decoder and come out black.
        vae.to(torch.float32)
        try:
            decoded = vae.decode(latents.float() / vae.config.scaling_factor, return_dict=False)[0]
        finally:
            vae.to(held_as)
        _check_finite(decoded)
        picture: Image.Image = self._from_text.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture


def strength(steps: int, denoise: float) -> float:
    """What diffusers must be told so that ``denoise`` of ``steps`` steps run, but at least one.

    diffusers runs ``int(steps * strength)`` steps and fails where that is none.
    """
    # One and a half steps, so that rounding cannot make it none again.
    return denoise if int(steps * denoise) >= 1 else min(1.0, 1.5 / steps)


def load_checkpoint(
    checkpoint: Checkpoint, config_dir: Path, device: torch.device, dtype: torch.dtype
) -> StableDiffusion:
    """The model of ``checkpoint`` on ``device``, its weights as ``dtype``.

    Raises:
        JobError: tensors are missing, or are not of the shapes the configuration says; not retryable.
    """
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(checkpoint.path),
            config=str(config_dir),
            local_files_only=True,
            safety_checker=None,
            torch_dtype=dtype,
        )
    except (ValueError, KeyError) as error:  # diffusers' way to say that a tensor is missing or misshapen
        reason = (str(error).splitlines() or [""])[0][:300]
        raise JobError(f"{checkpoint.path.name} holds no whole model: {reason}", retryable=False) from error
    except NotImplementedError as error:  # torch, asked to move or cast what the file did not bring
        raise JobError(
            f"{checkpoint.path.name} holds no whole model: it lacks tensors of its UNet or VAE",
            retryable=False,
        ) from error
    _check_whole(pipeline, checkpoint.path.name)
    _check_tokenizer(pipeline, config_dir)
    return StableDiffusion(pipeline.to(device))


def _check_whole(pipeline: StableDiffusionPipeline, name: str) -> None:
    # What the file does not bring stays on the meta device, and would fail far away at the first step.
    for part in _PARTS:
        missing = [key for key, tensor in getattr(pipeline, part).named_parameters() if tensor.is_meta]
        if missing:
            raise JobError(
                f"{name} lacks {len(missing)} tensors of its {part}, the first {missing[0]}", retryable=False
            )


def _check_tokenizer(pipeline: StableDiffusionPipeline, config_dir: Path) -> None:
    # A folder without tokenizer files silently yields a tokenizer of two tokens.
    expected, found = pipeline.text_encoder.config.vocab_size, len(pipeline.tokenizer)
    if found != expected:
        raise JobError(
            f"the tokenizer in {config_dir} has {found} entries instead of {expected}: "
            "this installation is damaged",
            retryable=True,
        )


def _check_finite(tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise JobError(
            "the model computed numbers that are not finite (NaN), which would be a black picture; "
            "its weights are damaged or overflow this device's precision",
            retryable=False,
        )
