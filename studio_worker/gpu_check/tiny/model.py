"""What a tiny model is: the library's modules, the family of their sizes, its files in each form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from studio_worker.engine.families.family import Family
from studio_worker.gpu_check.tiny.quantised import Kind, without_outer_ones, write_eight_bit, write_gguf
from studio_worker.gpu_check.tiny.weights import Tensors, safetensors
from studio_worker.models import FileRole, LocalFile

Form = Literal["safetensors", "Q8_0", "Q4_K", "8-bit"]
FORMS: tuple[Form, ...] = ("safetensors", "Q8_0", "Q4_K", "8-bit")

_LORA_RANK = 4
_LORA_STRENGTH = 1.5
"""Beside weights that keep the size of what goes through them."""


@dataclass(frozen=True)
class Published:
    """One file of a model.

    Args:
        name: what it is called, without an ending.
        tensors: under their published names; none where only GGUF files hold them by themselves.
        architecture: GGUF's word for what it is; empty where it is not published so.
        in_gguf: its tensors in GGUF files, where they are called otherwise there.
        scale: what the scale of a matrix is called where it is published in 8-bit floats; empty where those
            have none; ``None`` where it is not published so.
    """

    name: str
    role: FileRole
    tensors: Tensors
    architecture: str = ""
    in_gguf: Tensors | None = None
    scale: str | None = None

    def forms(self) -> set[Form]:
        """The forms in which it is published."""
        found: set[Form] = {"safetensors"}
        if self.architecture:
            found |= {"Q8_0", "Q4_K"}
        return found if self.scale is None else found | {"8-bit"}

    def write(
        self, folder: Path, form: Form = "safetensors", dtype: torch.dtype | None = None
    ) -> LocalFile | None:
        """The file in ``form``, as safetensors where it is not published so, its plain numbers as ``dtype``;
        ``None`` where another file of the model holds it.
        """
        form = form if form in self.forms() else "safetensors"
        path = folder / f"{self.name}-{form}"
        if form == "safetensors":
            if not self.tensors:
                return None
            return safetensors(path.with_suffix(".safetensors"), self.role, self.tensors, dtype)
        if form == "8-bit":  # other numbers are as they are
            return write_eight_bit(
                path.with_suffix(".safetensors"), self.role, self.tensors, self.scale or ""
            )
        tensors = self.tensors if self.in_gguf is None else self.in_gguf
        if self.role == "model":  # whole checkpoints are stable-diffusion.cpp's
            tensors = without_outer_ones(tensors)
        return write_gguf(path.with_suffix(".gguf"), self.role, tensors, self.architecture, Kind[form])


@dataclass(frozen=True)
class Tiny:
    """A tiny random model.

    Args:
        parts: the library's own modules by the pipelines' names.
        published: its files, by the names of the parts they hold, or ``model``.
        folder: for its files.
    """

    family: Family
    parts: Mapping[str, Any]
    published: Mapping[str, Published]
    folder: Path

    def forms(self) -> tuple[Form, ...]:
        """The forms in which any of its files are published."""
        found = {form for file in self.published.values() for form in file.forms()}
        return tuple(form for form in FORMS if form in found)

    def files(self, form: Form = "safetensors", dtype: torch.dtype | None = None) -> tuple[LocalFile, ...]:
        """All its files, in ``form`` as far as they are published so."""
        written = (file.write(self.folder, form, dtype) for file in self.published.values())
        return tuple(file for file in written if file is not None)

    def file(self, part: str, form: Form = "safetensors") -> LocalFile:
        """The file that holds ``part``."""
        written = self.published[part].write(self.folder, form)
        assert written is not None
        return written

    def lora(self) -> LocalFile:
        """A LoRA on the values of its denoiser's attention, in diffusers' layout; it shows clearly."""
        name = self.family.denoiser
        generator = torch.Generator().manual_seed(9)
        tensors = {}
        for place, layer in self.parts[name].named_modules():
            if place.endswith("to_v"):
                down = torch.randn(_LORA_RANK, layer.in_features, generator=generator)
                up = torch.randn(layer.out_features, _LORA_RANK, generator=generator)
                tensors[f"{name}.{place}.lora_A.weight"] = _LORA_STRENGTH * down * layer.in_features**-0.5
                tensors[f"{name}.{place}.lora_B.weight"] = up * _LORA_RANK**-0.5
        return safetensors(self.folder / "lora.safetensors", "lora", tensors)
