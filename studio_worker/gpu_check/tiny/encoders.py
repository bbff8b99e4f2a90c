"""Text encoders and VAEs that tiny models of several families have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from studio_worker.gpu_check.tiny.model import Published
from studio_worker.gpu_check.tiny.quantised import llama_cpp
from studio_worker.gpu_check.tiny.weights import drawn, prefixed, state

SCALE = "{}.scale_weight"
"""What ComfyUI's files of 8-bit floats call the scale of a matrix (``comfy/ops.py``)."""

VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""As FLUX.1's, but for the sizes: eight times smaller latents, no quantisation convolutions."""

CLIP: Mapping[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}


def t5_config(width: int = 32) -> dict[str, Any]:
    """T5's configuration, ``width`` numbers a token."""
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_ff": 2 * width,
        "d_kv": width // 2,
        "num_heads": 2,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "tie_word_embeddings": True,
        "use_cache": False,
    }


def drawn_vae(config: Mapping[str, Any], seed: int) -> Any:
    return drawn(AutoencoderKL.from_config(dict(config)), seed)


def drawn_clip(config: Mapping[str, Any], seed: int, *, projected: bool = False) -> Any:
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return drawn(cls(CLIPTextConfig(**config)), seed)


def drawn_t5(config: Mapping[str, Any], seed: int) -> Any:
    return drawn(T5EncoderModel(T5Config(**config)), seed)


def published_clip(clip: Any, name: str = "clip_l") -> Published:
    """As comfyanonymous/flux_text_encoders and Stability AI publish it: transformers' names, those of CLIP-L
    below ``text_model.``.
    """
    tensors = state(clip)
    if not any(each.startswith("text_model.") for each in tensors):
        tensors = prefixed(tensors, "text_model.")
    return Published(name, "text-encoder", tensors)


def published_t5(t5: Any) -> Published:
    """``t5xxl_fp16``, ``t5xxl_fp8_e4m3fn_scaled``; city96/t5-v1_1-xxl-encoder-gguf in llama.cpp's names."""
    tensors = state(t5)
    in_gguf = llama_cpp(tensors, gguf.MODEL_ARCH.T5ENCODER, t5.config.num_layers)
    return Published("t5xxl", "text-encoder", tensors, "t5encoder", in_gguf, SCALE)
