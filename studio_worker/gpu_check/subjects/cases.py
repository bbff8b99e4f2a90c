"""The models of full size that are timed, and for rehearsals small ones that stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from studio_worker.engine.families.family import Family
from studio_worker.engine.families.sdxl import SDXL
from studio_worker.engine.families.z_image import Z_IMAGE
from studio_worker.engine.loading import empty_model
from studio_worker.gpu_check.places import free_bytes
from studio_worker.gpu_check.rows import Skipped
from studio_worker.gpu_check.subjects.random_weights import Drawn, shapes, write_plain, write_q4_k
from studio_worker.gpu_check.tiny import layouts
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.gpu_check.tiny.z_image import language_model
from studio_worker.models import LocalFile

_SPARE_BYTES = 6 << 30
"""Beside the weights, for a picture of 1024 pixels a side."""


@dataclass(frozen=True)
class Case:
    """A model to time: its family, how a picture of it is made, and what the plain pipeline calls that.

    Args:
        form: of the files of its denoiser and its text encoders.
        disk_bytes: of its files, about.
        device_bytes: what it takes of the device, about.
    """

    family: Family
    form: Literal["float16", "Q4_K"]
    side: int
    steps: int
    guidance: float
    called: Mapping[str, Any]
    disk_bytes: int
    device_bytes: int

    def check_room(self, folder: Path, device_bytes: int) -> None:
        """
        Raises:
            Skipped: there is no room for it.
        """
        if (free := free_bytes(folder)) < self.disk_bytes:
            raise Skipped(f"its files need {self.disk_bytes / 1e9:.0f} GB, {folder} has {free / 1e9:.0f} GB")
        if device_bytes < self.device_bytes:
            needed, has = self.device_bytes / 1e9, device_bytes / 1e9
            raise Skipped(f"it needs {needed:.0f} GB of the device's memory, which has {has:.0f} GB")

    def write(self, folder: Path, drawn: Drawn) -> tuple[LocalFile, ...]:
        """Its files of random weights, one for each component."""
        parts = self.family.parts
        files = {}
        if self.form == "Q4_K":
            files = {
                "transformer": ("lumina2", layouts.z_image(shapes(parts["transformer"]))),
                "text_encoder": ("qwen3", language_model(empty_model(parts["text_encoder"]))),
            }
        return tuple(
            write_q4_k(folder / f"{name}.gguf", part.role, *files[name], drawn)
            if name in files
            else write_plain(folder / f"{name}.safetensors", part, torch.float16, drawn)
            for name, part in parts.items()
        )


_CASES: Mapping[str, Case] = {
    # As the studio has it: GGUF's Q4_K. No guidance is a guidance of 0 to diffusers.
    "z-image": Case(
        Z_IMAGE,
        form="Q4_K",
        side=1024,
        steps=8,
        guidance=1.0,
        called={"guidance_scale": 0.0},
        disk_bytes=7 << 30,
        device_bytes=(7 << 30) + _SPARE_BYTES,
    ),
    "sdxl": Case(
        SDXL,
        form="float16",
        side=1024,
        steps=20,
        guidance=7.0,
        called={"guidance_scale": 7.0},
        disk_bytes=8 << 30,
        device_bytes=(7 << 30) + _SPARE_BYTES,
    ),
}


def case(name: str, folder: Path, *, small: bool) -> Case:
    """The model called ``name``; ``folder`` is for what a small one is configured by."""
    full = _CASES[name]
    if not small:
        return full
    family = tiny(name, folder, width=256 if full.form == "Q4_K" else 32).family
    return replace(full, family=family, side=64, steps=2, disk_bytes=0, device_bytes=0)
