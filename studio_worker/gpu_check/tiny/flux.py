"""Tiny models of FLUX.1's kind: dev, schnell and Fill, and Chroma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel

from studio_worker.engine.families import flux as families
from studio_worker.engine.families.chroma import chroma
from studio_worker.engine.families.flux import Flux, flux
from studio_worker.gpu_check.tiny import compvis, layouts
from studio_worker.gpu_check.tiny.encoders import (
    CLIP,
    SCALE,
    VAE,
    drawn_clip,
    drawn_t5,
    drawn_vae,
    published_clip,
    published_t5,
    t5_config,
)
from studio_worker.gpu_check.tiny.model import Published, Tiny
from studio_worker.gpu_check.tiny.weights import config, drawn, state


def flux_config(like: Flux, width: int = 32) -> dict[str, Any]:
    """The configuration of a transformer of the kind of ``like``, ``width`` numbers a token."""
    own = {
        "guidance_embeds": like is not families.FLUX_SCHNELL,
        "pooled_projection_dim": CLIP["projection_dim"],
        # Fill: the picture's latents, its masked latents, and 8x8 mask pixels of each of 4
        **({"in_channels": 16 + 16 + 4 * 64, "out_channels": 16} if like is families.FLUX_FILL else {}),
    }
    return _config("FluxTransformer2DModel", width) | own


def chroma_config(width: int = 32) -> dict[str, Any]:
    own = {"approximator_num_channels": 32, "approximator_hidden_dim": width, "approximator_layers": 2}
    return _config("ChromaTransformer2DModel", width) | own


def _config(cls: str, width: int) -> dict[str, Any]:
    head = width // 2
    return {
        "_class_name": cls,
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": head,
        "num_attention_heads": 2,
        "joint_attention_dim": width,
        "axes_dims_rope": [head // 4, head * 3 // 8, head * 3 // 8],
    }


def tiny_flux(folder: Path, like: Flux, width: int = 32) -> Tiny:
    """Of the kind of ``like``, by its class, its scheduler, its pipelines and how many tokens it reads."""
    numbers = {
        "transformer": flux_config(like, width),
        "text_encoder": CLIP,
        "text_encoder_2": t5_config(width),
        "vae": VAE,
    }
    parts = {
        "transformer": drawn(FluxTransformer2DModel.from_config(numbers["transformer"]), 4),
        "text_encoder": drawn_clip(CLIP, 1),
        "text_encoder_2": drawn_t5(numbers["text_encoder_2"], 2),
        "vae": drawn_vae(VAE, 3),
    }
    folders = {name: config(folder / name, each) for name, each in numbers.items()}
    family = flux(
        f"tiny-{like.name}",
        {**families.FOLDERS, **folders, "scheduler": like.scheduler},
        type(like),
        pipelines=like.pipelines,
        prompt_tokens=like.prompt_tokens,
    )
    denoiser = layouts.black_forest(state(parts["transformer"]))
    # As Black Forest Labs' and comfyanonymous' files, flux1-dev-fp8, and city96/FLUX.1-dev-gguf.
    published = {
        "transformer": Published(like.name, "diffusion-model", denoiser, "flux", scale=SCALE),
        "text_encoder": published_clip(parts["text_encoder"]),
        "text_encoder_2": published_t5(parts["text_encoder_2"]),
        "vae": Published("ae", "vae", compvis.vae(state(parts["vae"]), 4)),
    }
    return Tiny(family, parts, published, folder)


def tiny_chroma(folder: Path, width: int = 32) -> Tiny:
    """``Chroma1-HD.safetensors`` as lodestones publishes it (FLUX.1's names and its own, no prefix), with T5
    and ``ae.safetensors`` beside it.
    """
    numbers = {"transformer": chroma_config(width), "text_encoder": t5_config(width), "vae": VAE}
    parts = {
        "transformer": drawn(ChromaTransformer2DModel.from_config(numbers["transformer"]), 1),
        "text_encoder": drawn_t5(numbers["text_encoder"], 2),
        "vae": drawn_vae(VAE, 3),
    }
    folders = [config(folder / name, each) for name, each in numbers.items()]
    denoiser = layouts.black_forest(state(parts["transformer"]))
    published = {
        "transformer": Published("chroma", "diffusion-model", denoiser, "chroma", scale=SCALE),
        "text_encoder": published_t5(parts["text_encoder"]),
        "vae": Published("ae", "vae", compvis.vae(state(parts["vae"]), 4)),
    }
    return Tiny(chroma("tiny-chroma", *folders), parts, published, folder)
