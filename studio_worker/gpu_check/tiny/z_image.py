"""A tiny Z-Image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from studio_worker.engine.families.z_image import z_image
from studio_worker.gpu_check.tiny import compvis, layouts
from studio_worker.gpu_check.tiny.encoders import SCALE
from studio_worker.gpu_check.tiny.model import Published, Tiny
from studio_worker.gpu_check.tiny.quantised import llama_cpp
from studio_worker.gpu_check.tiny.weights import Tensors, byte_tokenizer, config, config_of, drawn, prefixed


def tiny_z_image(folder: Path, axes: Sequence[int] = (16, 16, 16), text_width: int = 64) -> Tiny:
    """Two heads as wide as all ``axes``; a text encoder that reads bytes, ``text_width`` numbers each."""
    tokenizer = byte_tokenizer(
        folder / "tokenizer", {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    )
    transformer = ZImageTransformer2DModel(
        dim=2 * sum(axes),
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=text_width,
        axes_dims=list(axes),
    )
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=288,
            hidden_size=text_width,
            intermediate_size=2 * text_width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=[16, 32, 32],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts: dict[str, Any] = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    for seed, part in enumerate(parts.values(), 3):
        drawn(part, seed)
    configs = {name: config(folder / name, config_of(part)) for name, part in parts.items()}
    denoiser = layouts.z_image(transformer.state_dict())
    text = prefixed(text_encoder.state_dict(), "model.")
    # As Comfy-Org/z_image_turbo has them, and city96's and unsloth's GGUF files.
    published = {
        "transformer": Published("z_image", "diffusion-model", denoiser, "lumina2", scale=SCALE),
        "text_encoder": Published(
            "qwen_3", "text-encoder", text, "qwen3", language_model(text_encoder), SCALE
        ),
        "vae": Published("ae", "vae", compvis.vae(vae.state_dict(), levels=3)),
    }
    family = z_image("tiny-z-image", **configs, tokenizer=tokenizer)
    return Tiny(family, parts, published, folder)


def language_model(text_encoder: Any) -> Tensors:
    """The text encoder under llama.cpp's names."""
    state = prefixed(text_encoder.state_dict(), "model.")
    return llama_cpp(state, gguf.MODEL_ARCH.QWEN3, text_encoder.config.num_hidden_layers)
