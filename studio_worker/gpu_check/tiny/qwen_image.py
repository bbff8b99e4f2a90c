"""Tiny models of Qwen-Image's kind, which read reference pictures too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from studio_worker.engine.families.qwen_image import (
    FOLDERS,
    QWEN_IMAGE_EDIT_2511,
    ZERO_COND_T,
    QwenImage,
    qwen_image,
)
from studio_worker.gpu_check.tiny import layouts
from studio_worker.gpu_check.tiny.encoders import SCALE
from studio_worker.gpu_check.tiny.model import Published, Tiny
from studio_worker.gpu_check.tiny.quantised import llama_cpp
from studio_worker.gpu_check.tiny.weights import Tensors, config, drawn, state

VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKLQwenImage",
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "input_channels": 3,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.1, 0.9, 1.3, 1.0],
}
VISION: Mapping[str, Any] = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}


def transformer_config(width: int = 32, text_width: int = 32) -> dict[str, Any]:
    head = width // 2
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": head,
        "num_attention_heads": 2,
        "joint_attention_dim": text_width,
        "axes_dims_rope": [head // 4, head * 3 // 8, head * 3 // 8],
    }


def text_config(width: int = 32) -> dict[str, Any]:
    pairs = width // 4
    return {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [pairs // 4, pairs * 3 // 8, pairs * 3 // 8],
        },
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-06,
    }


def tiny_qwen_image(folder: Path, like: QwenImage, width: int = 32, text_width: int = 32) -> Tiny:
    """Of the kind of ``like``, as Comfy-Org publishes them (Qwen-Image_ComfyUI/split_files): with diffusers'
    names for the denoiser, those of transformers 4.49 for the text encoder, vision encoder and head included,
    and Wan's for the VAE; or as city96, unsloth and others publish them as GGUF.
    """
    numbers: dict[str, Mapping[str, Any]] = {
        "transformer": transformer_config(width, text_width),
        "text_encoder": text_config(text_width),
        "vision": {**VISION, "out_hidden_size": text_width},
        "vae": VAE,
    }
    is_2511 = like is QWEN_IMAGE_EDIT_2511
    if is_2511:
        numbers["transformer"] = {**numbers["transformer"], "zero_cond_t": True}
    parts = {
        "transformer": drawn(QwenImageTransformer2DModel.from_config(dict(numbers["transformer"])), 1),
        "text_encoder": drawn(
            Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=numbers["text_encoder"], vision_config=numbers["vision"])
            ),
            2,
        ),
        "vae": drawn(AutoencoderKLQwenImage.from_config(dict(VAE)), 3),
    }
    folders = {**FOLDERS, **{name: config(folder / name, each) for name, each in numbers.items()}}
    family = qwen_image(f"tiny-{like.name}", folders)
    denoiser, text = state(parts["transformer"]), state(parts["text_encoder"])
    # GGUF files lack the mark: one of the later model would be taken for the first.
    marked = denoiser | {ZERO_COND_T: torch.empty(0)} if is_2511 else denoiser
    architecture = "" if is_2511 else "qwen_image"
    published = {
        "transformer": Published(like.name, "diffusion-model", marked, architecture, scale=SCALE),
        "text_encoder": Published(
            "qwen_2.5_vl", "text-encoder", as_published(text), "qwen2vl", language_model(text), SCALE
        ),
        "vision": Published("mmproj", "text-encoder-vision", {}, "clip", mmproj(text)),
        "vae": Published("qwen_image_vae", "vae", layouts.wan_vae(state(parts["vae"]))),
    }
    return Tiny(family, parts, published, folder)


def as_published(tensors: Tensors) -> Tensors:
    """Qwen2.5-VL's tensors as its repository names them: ``model.`` and ``visual.``, which transformers has
    since moved into ``model.language_model.`` and ``model.visual.``.
    """
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }


def language_model(tensors: Tensors, layers: int = 2) -> Tensors:
    """The language model as llama.cpp converts it (architecture ``qwen2vl``), which unsloth and mradermacher
    publish.
    """
    language = {name.replace("model.language_model.", "model."): tensor for name, tensor in tensors.items()}
    return llama_cpp(language, gguf.MODEL_ARCH.QWEN2VL, layers)


def mmproj(tensors: Tensors, depth: int = 2) -> Tensors:
    """The vision encoder as llama.cpp's ``mmproj`` file has it.

    Source: https://github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py, Qwen2VLVisionModel): queries, keys
    and values apart, the patch convolution taken apart by frame.
    """
    vision = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.visual.")
    }
    for layer in range(depth):
        attention = f"visual.blocks.{layer}.attn"
        for leaf in ("weight", "bias"):
            fused = vision.pop(f"{attention}.qkv.{leaf}")
            vision |= {
                f"{attention}.{each}.{leaf}": part for each, part in zip("qkv", fused.chunk(3), strict=True)
            }
    frames = vision.pop("visual.patch_embed.proj.weight")
    named = llama_cpp(vision, gguf.MODEL_ARCH.MMPROJ, 3)  # its merger counts as blocks to 2
    return named | {"v.patch_embd.weight": frames[:, :, 0], "v.patch_embd.weight.1": frames[:, :, 1]}
