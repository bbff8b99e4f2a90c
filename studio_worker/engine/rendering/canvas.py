"""What a picture is made on: latents of the right size, what is in them to begin with, and what stays.

This module owns the way from given pictures to tensors. Its draws of noise have an order of their own, which
starts anew for denoising: the initial picture's, the reference's, the masked picture's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from studio_worker.engine.families.family import Family, JobKind, Seen
from studio_worker.engine.images import cells, in_area
from studio_worker.engine.parameters import Parameters
from studio_worker.engine.sampling.denoising import Kept, drawn
from studio_worker.engine.sampling.noise import Noise
from studio_worker.errors import JobError


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


class Canvas:
    """The latents of one job.

    Attributes:
        picture: the initial picture's, or zeros.
        kept: what of them a mask protects, if there is one.
        seen: what the denoiser sees besides.
    """

    def __init__(
        self, family: Family, vae: Any, parameters: Parameters, starting: Starting, device: torch.device
    ) -> None:
        self._family, self._vae, self._device = family, vae, device
        self._noise = Noise(parameters.seed)
        self.picture = self._begun(parameters, starting)
        height, width = self.picture.shape[-2:]
        self.seen = Seen(height, width)
        self.kept: Kept | None = None
        if starting.reference is not None:
            area = min(family.reference_pixels, parameters.width * parameters.height)
            shown = in_area(starting.reference, area, family.reference_multiple)
            self.seen = replace(self.seen, reference=self._encoded(_pixels(shown)))
        elif starting.mask is not None:
            self._protect(starting, starting.mask)

    def _begun(self, parameters: Parameters, starting: Starting) -> torch.Tensor:
        if starting.picture is not None:
            return self._encoded(_pixels(starting.picture))
        cell = latent_px(self._vae)
        channels = self._family.latent_channels(self._vae)
        return torch.zeros(
            1, channels, parameters.height // cell, parameters.width // cell, device=self._device
        )

    def _protect(self, starting: Starting, mask: Image.Image) -> None:
        assert starting.picture is not None
        by_cell = torch.from_numpy(cells(mask, self.seen.width, self.seen.height))[None, None]
        by_cell = by_cell.to(self._device)
        if self._family.sees_mask:
            by_pixel = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)[None, None]
            masked = self._encoded(_pixels(starting.picture) * (1 - by_pixel))
            self.seen = replace(self.seen, masked=masked, cells=by_cell, pixels=by_pixel.to(self._device))
            # Such a model sees the edge: it may also paint what touches the mask, as in stable-diffusion.cpp.
            by_cell = torch.nn.functional.max_pool2d(by_cell, 3, stride=1, padding=1)
        self.kept = Kept(self.picture, by_cell)

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents in single precision of a picture (1, 3, height, width) of -1 to 1."""
        with wide_enough(self._vae):
            given = pixels.to(self._device).to(self._vae.dtype)
            latents = self._family.encoded_picture(self._vae, given, lambda like: drawn(self._noise, like))
        check_finite(latents)
        found: torch.Tensor = latents.float()
        return found


def latent_px(vae: Any) -> int:
    """How many pixels a side of a cell of latents has."""
    # A video VAE tells which of its levels also join frames; others have one level more than they halve.
    config = vae.config
    levels = config.dim_mult if "dim_mult" in config else config.block_out_channels
    side: int = 2 ** (len(levels) - 1)
    return side


@contextmanager
def wide_enough(vae: Any) -> Iterator[None]:
    """Inside, ``vae`` computes in single precision if it is held in half: many published ones overflow that,
    and their pictures come out black.
    """
    held_as = vae.dtype
    if held_as == torch.float16:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if held_as == torch.float16:
            vae.to(held_as)


def check_finite(tensor: torch.Tensor) -> None:
    """
    Raises:
        JobError: the model computed what is no number.
    """
    if not torch.isfinite(tensor).all():
        raise JobError(
            "the model computed numbers that are not finite (NaN), which would be a black picture; "
            "its weights are damaged or overflow this device's precision"
        )


def _pixels(picture: Image.Image) -> torch.Tensor:
    """``picture`` as numbers of -1 to 1 (1, 3, height, width)."""
    levels = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(levels).permute(2, 0, 1)[None] * 2 - 1
