"""The library's own pipelines, given what stable-diffusion.cpp decides: noise, noise levels and starts.

Everything else of a picture is theirs: text encoders, denoiser, guidance, Euler's method, decoder. So they
stay the judge of what the engine computes, while noise and levels have published numbers as their own judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from studio_worker import sample_model
from studio_worker.engine.sampling.noise import normal


def sample_pipeline() -> StableDiffusionPipeline:
    """diffusers' own pipeline from the sample model's one file; nothing of ours, no network."""
    pipeline = StableDiffusionPipeline.from_single_file(
        str(sample_model.WEIGHTS),
        config=str(sample_model.CONFIG_DIR),
        local_files_only=True,
        safety_checker=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def philox(seed: int, shape: Sequence[int], draw: int = 0) -> torch.Tensor:
    return torch.from_numpy(normal(seed, draw, int(np.prod(shape)))).reshape(tuple(shape))


def flow_levels(steps: int, shift: float) -> list[float]:
    plain = np.linspace(1000, 1, steps) / 1000
    return [float(level) for level in shift * plain / (1 + (shift - 1) * plain)]


def noise_levels(alphas_cumprod: torch.Tensor, steps: int) -> list[float]:
    alphas = alphas_cumprod.double().numpy()
    logs = np.log((1 - alphas) / alphas) / 2
    return [float(level) for level in np.exp(np.interp(np.linspace(999, 0, steps), np.arange(1000), logs))]


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether pictures are equal but for what rounding to 255 levels tips over: one value in a thousand, by
    one level. Both sides compute the same in single precision, in another order.
    """
    apart = np.abs(one.astype(int) - other.astype(int))
    return bool(apart.max() <= 1 and apart.mean() <= 0.001)


def encoded(
    vae: Any, picture: Image.Image, seed: int, draw: int = 0, mask: Image.Image | None = None
) -> torch.Tensor:
    """The latents of ``picture`` without what ``mask`` says, the spread of an AutoencoderKL drawn from
    ``seed``.
    """
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    if mask is not None:
        pixels = pixels * (1 - torch.from_numpy(np.asarray(mask, dtype=np.float32)) / 255)
    with torch.no_grad():
        if "latents_mean" in vae.config and vae.config.latents_mean is not None:
            mean, deviation = (
                torch.tensor(numbers).view(1, -1, 1, 1)
                for numbers in (vae.config.latents_mean, vae.config.latents_std)
            )
            return (vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / deviation
        spread = vae.encode(pixels).latent_dist
        drawn = spread.mean + spread.std * philox(seed, spread.mean.shape, draw)
    return (drawn - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents as FLUX.1 and those after it have them: a row of squares, each of two by two cells."""
    _, channels, height, width = latents.shape
    squares = latents.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(1, height * width // 4, channels * 4)


def run(
    pipeline: Any,
    *,
    width: int,
    height: int,
    steps: int,
    seed: int,
    shift: float | None = None,
    picture: Image.Image | None = None,
    denoise: float = 1.0,
    mask: Image.Image | None = None,
    is_grown: bool = False,
    **arguments: Any,
) -> Image.Image:
    """What a text-to-image ``pipeline`` makes.

    Args:
        shift: of a flow model's levels; ``None`` for models that predict noise or v.
        picture: what the picture starts from, noised; with ``mask``, it stays where that is black.
        is_grown: whether cells beside the mask may change as well.
    """
    pipeline.set_progress_bar_config(disable=True)
    if shift is None:
        config = {**pipeline.scheduler.config, "timestep_spacing": "linspace"}
        pipeline.scheduler = EulerDiscreteScheduler.from_config(config)
        levels = noise_levels(pipeline.scheduler.alphas_cumprod, steps)
    else:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        levels = flow_levels(steps, shift)
    if denoise < 1:
        levels = levels[-(int(steps * denoise) + 1) :]
    config = pipeline.vae.config
    cell = 2 ** (len(config.get("block_out_channels") or config.dim_mult) - 1)
    channels = config.get("latent_channels") or config.z_dim
    size = (1, channels, height // cell, width // cell)
    begun = torch.zeros(size) if picture is None else encoded(pipeline.vae, picture, seed)
    noise = philox(seed, size)

    def noised(level: float) -> torch.Tensor:
        return begun * (1 if shift is None else 1 - level) + noise * level

    def given(latents: torch.Tensor) -> torch.Tensor:
        return packed(latents) if type(pipeline).__name__.startswith(("Flux", "Chroma", "Qwen")) else latents

    def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if mask is None:
            return tensors
        white = torch.from_numpy(np.asarray(mask.resize((size[3], size[2]), Image.Resampling.NEAREST)) > 0)
        white = white.float()[None, None]
        if is_grown:
            white = torch.nn.functional.max_pool2d(white, 3, stride=1, padding=1)
        white = white.expand(size)
        kept = noised([*levels, 0.0][step + 1])
        return {"latents": torch.where(given(white) > 0, tensors["latents"], given(kept))}

    start = noised(levels[0]) / (
        levels[0] if shift is None else 1
    )  # which the pipeline multiplies with again
    made: Image.Image = pipeline(
        width=width,
        height=height,
        num_inference_steps=len(levels),
        sigmas=levels if shift is not None else [*levels, 0.0],
        latents=given(start),
        callback_on_step_end=on_step_end,
        **arguments,
    ).images[0]
    return made
