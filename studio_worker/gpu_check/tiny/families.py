"""A tiny model of each family that is served."""

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
"""Numbers in a block of a K-quantisation (ggml's ``QK_K``): so long a row is whole blocks of any kind."""
NARROW = 32
"""Whole blocks of the other kinds."""

_VAE_WIDTHS = (8, 8, 16, 16)

Make = Callable[[Path, int], Tiny]


def _sd(like: stable_diffusion.StableDiffusion, channels: int = 4) -> Make:
    def make(folder: Path, width: int) -> Tiny:
        widths = (width // 4, width)
        return tiny_sd(folder, like, channels=channels, widths=widths, vae_widths=_VAE_WIDTHS)

    return make


def _sdxl(like: sdxl.StableDiffusionXL, channels: int = 4) -> Make:
    def make(folder: Path, width: int) -> Tiny:
        widths = (width // 4, width)
        return tiny_sdxl(folder, like, channels=channels, widths=widths, vae_widths=_VAE_WIDTHS)

    return make


def _flux(like: flux.Flux) -> Make:
    return lambda folder, width: tiny_flux(folder, like, width)


def _sd3(like: sd3.StableDiffusion3) -> Make:
    return lambda folder, width: tiny_sd3(folder, like, width)


def _qwen(like: qwen_image.QwenImage) -> Make:
    # Its vocabulary is the real one: a table of so many rows is kept narrow.
    return lambda folder, width: tiny_qwen_image(folder, like, width, text_width=min(64, width))


def _z_image(folder: Path, width: int) -> Tiny:
    return tiny_z_image(folder, (width // 8, width * 3 // 16, width * 3 // 16), text_width=width)


def _sample(folder: Path, _width: int) -> Tiny:
    """The sample model as it is."""
    family = stable_diffusion.SAMPLE
    published = Published("sample", "model", load_file(sample_model.WEIGHTS))
    return Tiny(family, {"unet": empty_model(family.parts["unet"])}, {"model": published}, folder)


_MAKE: Mapping[str, Make] = {
    "sd1": _sd(stable_diffusion.SD1),
    "sd1-inpaint": _sd(stable_diffusion.SD1_INPAINT, 9),
    "sd2": _sd(stable_diffusion.SD2),
    "sd2-inpaint": _sd(stable_diffusion.SD2_INPAINT, 9),
    "sdxl": _sdxl(sdxl.SDXL),
    "sdxl-v": _sdxl(sdxl.SDXL_V),
    "sdxl-v-zsnr": _sdxl(sdxl.SDXL_V_ZSNR),
    "sdxl-inpaint": _sdxl(sdxl.SDXL_INPAINT, 9),
    "sample": _sample,
    Z_IMAGE.name: _z_image,
    **{like.name: _qwen(like) for like in qwen_image.QWEN_FAMILIES},
    **{like.name: _flux(like) for like in flux.FLUX_FAMILIES},
    **{like.name: _sd3(like) for like in sd3.SD3_FAMILIES},
    chroma.CHROMA.name: tiny_chroma,
}


def tiny(name: str, folder: Path, width: int = WIDTH) -> Tiny:
    """A tiny model of the family ``name``, its files to be written in ``folder``.

    Args:
        width: numbers that its denoiser has for each place.
    """
    return _MAKE[name](folder, width)
