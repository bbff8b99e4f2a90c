"""A tiny random Z-Image: the library's pipeline over it, and its files in the published layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.z_image import z_image
from studio_worker.engine.loading import load_tokenizer
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests import tiny_models
from tests.engine_lab import decoded, request
from tests.quantising import Kind, llama_cpp, write_gguf

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

    def expected(self, cls: Any = ZImagePipeline, guidance: float = 0.0, **arguments: Any) -> np.ndarray:
        pipeline = cls(**self.stock.components)
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            request().task.prompt,
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(7),
            **arguments,
        )
        return np.asarray(made.images[0], dtype=int)


def tiny_z_image(folder: Path, axes: Sequence[int] = (16, 16, 16), text_width: int = 64) -> Tiny:
    """A model of random weights with two heads as wide as all ``axes``."""
    tokenizer = tiny_models.byte_tokenizer(
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
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    for seed, part in enumerate(parts.values()):
        tiny_models.randomised(part, seed)
    configs = {name: tiny_models.write_config(folder / name, part) for name, part in parts.items()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock = ZImagePipeline(tokenizer=load_tokenizer(tokenizer), scheduler=scheduler, **parts)
    return Tiny(stock, z_image("tiny-z-image", **configs, tokenizer=tokenizer), folder)


def original_transformer(transformer: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer under the original names: fused qkv, as ComfyUI's and GGUF files have it.

    Source: diffusers' ``convert_z_image_transformer_checkpoint_to_diffusers``, whose inverse this is.
    """
    state = dict(transformer)
    for name in [name for name in state if name.endswith(".attention.to_q.weight")]:
        stem = name.removesuffix(".to_q.weight")
        state[f"{stem}.qkv.weight"] = torch.cat([state.pop(f"{stem}.to_{each}.weight") for each in "qkv"])
    return tiny_models.renamed(
        state,
        lambda name: (
            name.replace("all_final_layer.2-1.", "final_layer.")
            .replace("all_x_embedder.2-1.", "x_embedder.")
            .replace(".attention.to_out.0.", ".attention.out.")
            .replace(".attention.norm_k.", ".attention.k_norm.")
            .replace(".attention.norm_q.", ".attention.q_norm.")
        ),
    )


def transformer_file(tiny: Tiny, layout: str) -> LocalFile:
    state = (
        tiny.stock.transformer.state_dict()
        if layout == "diffusers"
        else original_transformer(tiny.stock.transformer.state_dict())
    )
    if layout == "original, prefixed":
        state = tiny_models.prefixed(state, PREFIX)
    return tiny_models.write_safetensors(
        tiny.folder / f"transformer-{layout}.safetensors", state, "diffusion-model"
    )


def text_encoder_file(tiny: Tiny) -> LocalFile:
    state = tiny_models.prefixed(tiny.stock.text_encoder.state_dict(), "model.")
    return tiny_models.write_safetensors(tiny.folder / "qwen.safetensors", state, "text-encoder")


def vae_file(tiny: Tiny, layout: str = "original") -> LocalFile:
    state = tiny.stock.vae.state_dict()
    if layout == "original":
        state = tiny_models.original_vae(state, levels=3)
    return tiny_models.write_safetensors(tiny.folder / f"ae-{layout}.safetensors", state, "vae")


def language_model(tiny: Tiny) -> dict[str, torch.Tensor]:
    """The text encoder under llama.cpp's names."""
    state = tiny_models.prefixed(tiny.stock.text_encoder.state_dict(), "model.")
    return llama_cpp(state, gguf.MODEL_ARCH.QWEN3, 3)


def gguf_files(
    tiny: Tiny, kind: Kind | None, name: str, *, ours: bool = False
) -> tuple[LocalFile, LocalFile]:
    """Transformer and text encoder as GGUF files.

    Args:
        ours: as stable-diffusion.cpp converts, else as city96's ComfyUI-GGUF does.
    """
    state = original_transformer(tiny.stock.transformer.state_dict())
    transformer = write_gguf(
        tiny.folder / f"{name}.gguf",
        "diffusion-model",
        tiny_models.prefixed(state, PREFIX) if ours else state,
        "lumina2",
        kind,
        drop_outer_ones=ours,
    )
    text_encoder = write_gguf(
        tiny.folder / f"{name}-qwen.gguf",
        "text-encoder",
        language_model(tiny),
        "qwen3",
        kind,
    )
    return transformer, text_encoder
