"""Tiny models of Stable Diffusion 1.x, 2.x and XL, and their variants for inpainting and predicting v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from studio_worker.engine.families.component import CONFIGS
from studio_worker.engine.families.sdxl import Folders, StableDiffusionXL, sdxl
from studio_worker.engine.families.stable_diffusion import StableDiffusion, stable_diffusion
from studio_worker.gpu_check.tiny import compvis
from studio_worker.gpu_check.tiny.model import Published, Tiny
from studio_worker.gpu_check.tiny.weights import Tensors, config, config_of, drawn, prefixed

UNET, VAE = "model.diffusion_model.", "first_stage_model."

_CLIP = {"vocab_size": 49408, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def tiny_sd(
    folder: Path,
    like: StableDiffusion,
    *,
    channels: int = 4,
    widths: tuple[int, ...] = (32, 64),
    vae_widths: tuple[int, ...] = (16, 32),
) -> Tiny:
    """Of the kind of ``like``, Stable Diffusion 1.x or 2.x, by its class and its pipelines.

    Args:
        channels: that the UNet reads: 9 for inpainting.
        widths: of the UNet's levels.
        vae_widths: of the VAE's; each but the first halves the sides.
    """
    is_old = "sd1" in like.name
    parts = {
        "unet": _unet(widths, in_channels=channels, cross_attention_dim=32),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(**_CLIP, hidden_size=32, hidden_act="quick_gelu" if is_old else "gelu")
        ),
        "vae": _vae(vae_widths, 0.18215),
    }
    _write(folder, parts)
    for name in ("tokenizer", "scheduler"):
        (folder / name).symlink_to(CONFIGS / "sd1" / name)
    pad: dict[str, Any] = {} if is_old else {"pad_token": "!"}
    family = stable_diffusion(f"tiny-{like.name}", folder, type(like), pipelines=like.pipelines, **pad)
    whole = sd1_checkpoint(parts) if is_old else sd2_checkpoint(parts)
    return Tiny(family, parts, {"model": _whole(like.name, whole, "sd1")}, folder)


def tiny_sdxl(
    folder: Path,
    like: StableDiffusionXL,
    *,
    channels: int = 4,
    widths: tuple[int, ...] = (32, 64),
    vae_widths: tuple[int, ...] = (16, 32),
) -> Tiny:
    """Of the kind of ``like``, Stable Diffusion XL, by its scheduler, its markers and its pipelines; the rest
    as for :func:`tiny_sd`.
    """
    parts = {
        "unet": _unet(
            widths,
            in_channels=channels,
            cross_attention_dim=32 + 64,
            transformer_layers_per_block=[1, 2],
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 64,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**_CLIP, hidden_size=32)),
        "text_encoder_2": CLIPTextModelWithProjection(
            CLIPTextConfig(**_CLIP, hidden_size=64, projection_dim=64, hidden_act="gelu")
        ),
        "vae": _vae(vae_widths, 0.13025),
    }
    folders = replace(Folders(**_write(folder, parts)), scheduler=like.scheduler)
    family = sdxl(f"tiny-{like.name}", folders, markers=like.markers)
    family = replace(family, pipelines=like.pipelines)
    whole = sdxl_checkpoint(parts) | {marker: torch.empty(0) for marker in like.markers}
    # An empty tensor has no place in a GGUF file.
    published = _whole(like.name, whole, "" if like.markers else "sdxl")
    return Tiny(family, parts, {"model": published}, folder)


def _whole(name: str, tensors: Tensors, architecture: str) -> Published:
    """A checkpoint in one file. Those in 8-bit floats are plainly cast, as ComfyUI saves them."""
    return Published(name, "model", tensors, architecture, scale="")


def _unet(widths: tuple[int, ...], **options: Any) -> Any:
    down = ["DownBlock2D", "CrossAttnDownBlock2D"]
    return UNet2DConditionModel(
        block_out_channels=list(widths),
        down_block_types=down,
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        layers_per_block=1,
        norm_num_groups=8,
        use_linear_projection=True,
        sample_size=64,
        attention_head_dim=[4, 8],
        **options,
    )


def _vae(widths: tuple[int, ...], scaling: float) -> Any:
    return AutoencoderKL(
        block_out_channels=list(widths),
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        norm_num_groups=8,
        scaling_factor=scaling,
    )


def _write(folder: Path, parts: Mapping[str, Any]) -> dict[str, Path]:
    """Draws ``parts``; the folders with their configurations."""
    for seed, part in enumerate(parts.values()):
        drawn(part, seed)
    return {name: config(folder / name, config_of(part)) for name, part in parts.items()}


def unet_and_vae(parts: Mapping[str, Any]) -> Tensors:
    """What a checkpoint holds beside its text encoders."""
    levels = len(parts["vae"].config.block_out_channels)
    return {
        **prefixed(compvis.unet(parts["unet"].state_dict()), UNET),
        **prefixed(compvis.vae(parts["vae"].state_dict(), levels), VAE),
    }


def sd1_checkpoint(parts: Mapping[str, Any]) -> Tensors:
    """Source: ``v1-5-pruned-emaonly.safetensors``, whose text encoder has transformers' names."""
    text = prefixed(parts["text_encoder"].state_dict(), "cond_stage_model.transformer.text_model.")
    return unet_and_vae(parts) | text


def sd2_checkpoint(parts: Mapping[str, Any]) -> Tensors:
    """The text encoder has open_clip's names, with one layer more than is used.

    Source: ``v2-1_512-ema-pruned.safetensors``, of whose 24 layers diffusers' configuration has 23.
    """
    state = compvis.open_clip(parts["text_encoder"].state_dict())
    last = "transformer.resblocks.2."
    unused = {
        name.replace(last, "transformer.resblocks.3."): t.clone() for name, t in state.items() if last in name
    }
    return unet_and_vae(parts) | prefixed(state | unused, "cond_stage_model.model.")


def sdxl_checkpoint(parts: Mapping[str, Any]) -> Tensors:
    """Both text encoders as ``sd_xl_base_1.0.safetensors`` has them: transformers' and open_clip's."""
    first = prefixed(parts["text_encoder"].state_dict(), "text_model.")
    return {
        **unet_and_vae(parts),
        **prefixed(first, "conditioner.embedders.0.transformer."),
        **prefixed(compvis.open_clip(parts["text_encoder_2"].state_dict()), "conditioner.embedders.1.model."),
    }
