"""Tiny models of Stable Diffusion 3's kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import SD3Transformer2DModel

from studio_worker.engine.families.sd3 import SD3_MEDIUM, SD35_MEDIUM, Folders, StableDiffusion3, sd3
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

CLIP_G = {**CLIP, "hidden_act": "gelu"}
VAE_16 = {**VAE, "latent_channels": 16}
"""diffusers' inpainting pipeline takes no other number."""


def sd3_config(like: StableDiffusion3, width: int = 32) -> dict[str, Any]:
    """The configuration of a transformer of the kind of ``like``, ``width`` numbers a token."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": width // 2,
        "num_attention_heads": 2,
        "caption_projection_dim": width,
        "joint_attention_dim": max(64, width),  # at least both CLIPs side by side
        "pooled_projection_dim": 2 * CLIP["projection_dim"],
        "pos_embed_max_size": 8,
        "dual_attention_layers": [0] if like is SD35_MEDIUM else [],
        "qk_norm": None if like is SD3_MEDIUM else "rms_norm",
    }


def tiny_sd3(folder: Path, like: StableDiffusion3, width: int = 32) -> Tiny:
    """Of the kind of ``like``: normed queries and keys from 3.5 on, a second attention in 3.5 medium alone.

    Denoiser and VAE as ``sd3.5_large.safetensors`` without its prefixes, text encoders as Stability AI
    publishes them beside it, GGUF as city96/stable-diffusion-3.5-large-gguf.
    """
    numbers = {
        "transformer": sd3_config(like, width),
        "text_encoder": CLIP,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": t5_config(max(64, width)),
        "vae": VAE_16,
    }
    parts = {
        "transformer": drawn(SD3Transformer2DModel.from_config(numbers["transformer"]), 5),
        "text_encoder": drawn_clip(CLIP, 1, projected=True),
        "text_encoder_2": drawn_clip(CLIP_G, 2, projected=True),
        "text_encoder_3": drawn_t5(numbers["text_encoder_3"], 3),
        "vae": drawn_vae(VAE_16, 4),
    }
    # The published table of places is half precision's, not the one that the class computes.
    table = parts["transformer"].pos_embed
    table.pos_embed = (table.pos_embed * 0.9).half().float()
    folders = Folders(**{name: config(folder / name, each) for name, each in numbers.items()})
    denoiser = layouts.stability(state(parts["transformer"]))
    published = {
        "transformer": Published(like.name, "diffusion-model", denoiser, "sd3", scale=SCALE),
        "text_encoder": published_clip(parts["text_encoder"]),
        "text_encoder_2": published_clip(parts["text_encoder_2"], "clip_g"),
        "text_encoder_3": published_t5(parts["text_encoder_3"]),
        "vae": Published("vae", "vae", compvis.vae(state(parts["vae"]), 4)),
    }
    return Tiny(sd3(f"tiny-{like.name}", folders), parts, published, folder)
