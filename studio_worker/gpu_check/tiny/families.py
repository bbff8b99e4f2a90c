"""A tiny model of each family that is served, so wide that rows are whole blocks of every quantisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file

from studio_worker import sample_model
from studio_worker.engine.families import chroma, flux, qwen_image, sd3, sdxl, stable_diffusion
from studio_worker.engine.families.z_image import Z_IMAGE
from studio_worker.engine.loading import empty_model
from studio_worker.gpu_check.tiny.flux import tiny_chroma, tiny_flux
from studio_worker.gpu_check.tiny.model import Published, Tiny
from studio_worker.gpu_check.tiny.qwen_image import tiny_qwen_image
from studio_worker.gpu_check.tiny.sd3 import tiny_sd3
from studio_worker.gpu_check.tiny.stable_diffusion import tiny_sd, tiny_sdxl
from studio_worker.gpu_check.tiny.z_image import tiny_z_image

WIDTH = 256
"""Numbers in a block of a K-quantisation (ggml's ``QK_K``)."""

_UNET, _VAE = (64, WIDTH), (8, 8, 16, 16)


def _sd(like: stable_diffusion.StableDiffusion, channels: int = 4) -> Callable[[Path], Tiny]:
    return lambda folder: tiny_sd(folder, like, channels=channels, widths=_UNET, vae_widths=_VAE)


def _sdxl(like: sdxl.StableDiffusionXL, channels: int = 4) -> Callable[[Path], Tiny]:
    return lambda folder: tiny_sdxl(folder, like, channels=channels, widths=_UNET, vae_widths=_VAE)


def _flux(like: flux.Flux) -> Callable[[Path], Tiny]:
    return lambda folder: tiny_flux(folder, like, WIDTH)


def _sd3(like: sd3.StableDiffusion3) -> Callable[[Path], Tiny]:
    return lambda folder: tiny_sd3(folder, like, WIDTH)


def _qwen(like: qwen_image.QwenImage) -> Callable[[Path], Tiny]:
    return lambda folder: tiny_qwen_image(folder, like, WIDTH, text_width=64)


def _sample(folder: Path) -> Tiny:
    """The sample model as it is."""
    family = stable_diffusion.SAMPLE
    published = Published("sample", "model", load_file(sample_model.WEIGHTS))
    return Tiny(family, {"unet": empty_model(family.parts["unet"])}, {"model": published}, folder)


TINY: Mapping[str, Callable[[Path], Tiny]] = {
    "sd1": _sd(stable_diffusion.SD1),
    "sd1-inpaint": _sd(stable_diffusion.SD1_INPAINT, 9),
    "sd2": _sd(stable_diffusion.SD2),
    "sd2-inpaint": _sd(stable_diffusion.SD2_INPAINT, 9),
    "sdxl": _sdxl(sdxl.SDXL),
    "sdxl-v": _sdxl(sdxl.SDXL_V),
    "sdxl-v-zsnr": _sdxl(sdxl.SDXL_V_ZSNR),
    "sdxl-inpaint": _sdxl(sdxl.SDXL_INPAINT, 9),
    "sample": _sample,
    Z_IMAGE.name: lambda folder: tiny_z_image(folder, (32, 48, 48), text_width=WIDTH),
    **{like.name: _qwen(like) for like in qwen_image.QWEN_FAMILIES},
    **{like.name: _flux(like) for like in flux.FLUX_FAMILIES},
    **{like.name: _sd3(like) for like in sd3.SD3_FAMILIES},
    chroma.CHROMA.name: lambda folder: tiny_chroma(folder, WIDTH),
}
"""By the family's name; each makes the model for a folder of its files."""
