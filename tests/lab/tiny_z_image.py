"""A tiny random Z-Image: the library's pipeline over it, and its files in the published layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.family import Family
from studio_worker.engine.loading import load_tokenizer
from studio_worker.gpu_check.tiny import compvis, layouts, z_image
from studio_worker.gpu_check.tiny.quantised import Kind, without_outer_ones, write_gguf
from studio_worker.gpu_check.tiny.weights import prefixed, safetensors
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import decoded, request
from tests.lab.stock import run

PREFIX = "model.diffusion_model."
SIZE = CliDefaults(width=64, height=64, steps=3, cfg_scale=1.0)


@dataclass(frozen=True)
class Tiny:
    """A tiny Z-Image: the library's pipeline over it, its family, and a folder for its files."""

    stock: Any
    family: Family
    folder: Path

    def picture(self, *files: LocalFile, **task: Any) -> np.ndarray:
        engine = DiffusionEngine("cpu", families=(self.family,))
        made = engine.generate(
            request(files=files, defaults=SIZE, **task), lambda done, total: None, Cancel()
        )
        return np.asarray(decoded(made.data), dtype=int)

    def expected(self, guidance: float = 0.0, **arguments: Any) -> np.ndarray:
        made = run(
            ZImagePipeline(**self.stock.components),
            prompt=request().task.prompt,
            height=64,
            width=64,
            steps=3,
            seed=7,
            shift=3.0,
            guidance_scale=guidance,
            **arguments,
        )
        return np.asarray(made, dtype=int)


def tiny_z_image(folder: Path, axes: Sequence[int] = (16, 16, 16), text_width: int = 64) -> Tiny:
    """A model of random weights with two heads as wide as all ``axes``."""
    tiny = z_image.tiny_z_image(folder, axes, text_width)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    tokenizer = load_tokenizer(tiny.family.tokenizers["tokenizer"])
    return Tiny(ZImagePipeline(tokenizer=tokenizer, scheduler=scheduler, **tiny.parts), tiny.family, folder)


def transformer_file(tiny: Tiny, layout: str) -> LocalFile:
    state = tiny.stock.transformer.state_dict()
    if layout != "diffusers":
        state = layouts.z_image(state)
    if layout == "original, prefixed":
        state = prefixed(state, PREFIX)
    return safetensors(tiny.folder / f"transformer-{layout}.safetensors", "diffusion-model", state)


def text_encoder_file(tiny: Tiny) -> LocalFile:
    state = prefixed(tiny.stock.text_encoder.state_dict(), "model.")
    return safetensors(tiny.folder / "qwen.safetensors", "text-encoder", state)


def vae_file(tiny: Tiny, layout: str = "original") -> LocalFile:
    state = tiny.stock.vae.state_dict()
    if layout == "original":
        state = compvis.vae(state, levels=3)
    return safetensors(tiny.folder / f"ae-{layout}.safetensors", "vae", state)


def gguf_files(
    tiny: Tiny, kind: Kind | None, name: str, *, ours: bool = False
) -> tuple[LocalFile, LocalFile]:
    """Transformer and text encoder as GGUF files.

    Args:
        ours: as stable-diffusion.cpp converts, else as city96's ComfyUI-GGUF does.
    """
    state = layouts.z_image(tiny.stock.transformer.state_dict())
    transformer = write_gguf(
        tiny.folder / f"{name}.gguf",
        "diffusion-model",
        without_outer_ones(prefixed(state, PREFIX)) if ours else state,
        "lumina2",
        kind,
    )
    text_encoder = write_gguf(
        tiny.folder / f"{name}-qwen.gguf",
        "text-encoder",
        z_image.language_model(tiny.stock.text_encoder),
        "qwen3",
        kind,
    )
    return transformer, text_encoder
