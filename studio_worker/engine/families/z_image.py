"""Z-Image and Z-Image-Turbo: a single-stream flow transformer, Qwen3-4B as text encoder, the FLUX.1 VAE.

Both have the same shapes, so that a source's cliDefaults tell them apart: steps, cfgScale and flowShift (3
for Turbo, which is the default here as in stable-diffusion.cpp; 6 for the base model).

What the transformer's tensors are called: ``all_x_embedder.2-1``, ``attention.to_q`` in diffusers' files;
``x_embedder``, ``attention.qkv`` (fused) in the original ones and in GGUF files, with or without
``model.diffusion_model.`` before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, Tensors, Tokenizer, read_json
from studio_worker.engine.families.family import Family, Pipelines
from studio_worker.engine.families.parts import kl_vae
from studio_worker.engine.families.qwen import QWEN_TOKENIZER, qwen3
from studio_worker.engine.parameters import EngineDefaults, Parameters

_ADALN_WIDTH = 256
"""How wide the timestep's embedding is at most (diffusers' ADALN_EMBED_DIM)."""

_MAX_TOKENS = 512
"""The window of the prompt with its chat template: the pipeline's own default."""


@dataclass(frozen=True, kw_only=True)
class ZImage(Family):
    """One language model's last but one hidden state conditions the transformer."""

    def encode(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        positive, negative = pipeline.encode_prompt(
            parameters.prompt,
            do_classifier_free_guidance=parameters.guidance > 1,
            negative_prompt=parameters.negative_prompt,
            max_sequence_length=_MAX_TOKENS,
        )
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def guidance(self, parameters: Parameters) -> dict[str, Any]:
        # diffusers computes pos + g * (pos - neg) here, where everybody else has neg + g * (pos - neg).
        return {"guidance_scale": max(0.0, parameters.guidance - 1)}

    def strength(self, parameters: Parameters) -> float:
        return parameters.denoise or 1.0  # diffusers' flow pipelines round up to a whole step by themselves

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        template = pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return len(pipeline.tokenizer(template).input_ids) > _MAX_TOKENS


def z_image(
    name: str = "z-image",
    transformer: Path = CONFIGS / "z-image" / "transformer",
    text_encoder: Path = CONFIGS / "qwen3-4b",
    vae: Path = CONFIGS / "vae-16",
    tokenizer: Tokenizer = QWEN_TOKENIZER,
) -> ZImage:
    """The family of the sizes that the configurations say."""
    return ZImage(
        name=name,
        parts={
            "transformer": _transformer(f"{name} transformer", transformer),
            "text_encoder": qwen3("Qwen3-4B text encoder", text_encoder),
            "vae": kl_vae("16-channel VAE (ae.safetensors)", vae),
        },
        tokenizers={"tokenizer": tokenizer},
        scheduler=CONFIGS / "z-image" / "scheduler",
        pipelines=Pipelines(
            text="ZImagePipeline", image="ZImageImg2ImgPipeline", inpaint="ZImageInpaintPipeline"
        ),
        flow=True,
        halves=("bfloat16",),
        defaults=EngineDefaults(
            width=1024, height=1024, steps=8, guidance=1.0, sampler="euler", size_multiple=16
        ),
    )


def _transformer(kind: str, config_dir: Path) -> Part:
    config = read_json(config_dir / "config.json")
    dim, last = config["dim"], config["n_layers"] - 1
    patch = config["in_channels"] * config["all_patch_size"][0] ** 2
    common: dict[str, tuple[int | None, ...]] = {
        "cap_embedder.0.weight": (config["cap_feat_dim"],),
        "layers.0.adaLN_modulation.0.weight": (4 * dim, min(dim, _ADALN_WIDTH)),
    }

    def original(tensors: Tensors) -> Tensors:
        from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

        renamed: Tensors = convert_z_image_transformer_checkpoint_to_diffusers(tensors)
        return renamed

    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.ZImageTransformer2DModel",
        config=config_dir,
        layouts=(
            Layout(
                "original",
                common
                | {
                    "x_embedder.weight": (dim, patch),
                    f"layers.{last}.attention.qkv.weight": (3 * dim, dim),
                },
                original,
            ),
            Layout(
                "diffusers",
                common
                | {
                    "all_x_embedder.2-1.weight": (dim, patch),
                    f"layers.{last}.attention.to_q.weight": (dim, dim),
                },
            ),
        ),
    )


Z_IMAGE = z_image()
