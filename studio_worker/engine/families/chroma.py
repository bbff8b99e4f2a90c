"""Chroma: FLUX.1 schnell with its modulation computed by one small network, and true guidance; T5 alone reads
the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.engine.families.black_forest import from_black_forest
from studio_worker.engine.families.component import CONFIGS, Layout, Part, read_json
from studio_worker.engine.families.family import Family, Pipelines, unpacked
from studio_worker.engine.families.parts import kl_vae
from studio_worker.engine.families.t5 import T5_TOKENIZER, t5
from studio_worker.engine.parameters import EngineDefaults, Parameters

_PROMPT_TOKENS = 512
"""The pipelines' window."""


@dataclass(frozen=True, kw_only=True)
class Chroma(Family):
    """T5's tokens, of whose padding all but one are masked out; packed latents."""

    def encode(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        positive, _, mask, negative, _, negative_mask = pipeline.encode_prompt(
            prompt=parameters.prompt,
            negative_prompt=parameters.negative_prompt,
            do_classifier_free_guidance=parameters.guidance > 1,
            max_sequence_length=_PROMPT_TOKENS,
        )
        return {
            "prompt_embeds": positive,
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": negative,
            "negative_prompt_attention_mask": negative_mask,
        }

    def strength(self, parameters: Parameters) -> float:
        return parameters.denoise or 1.0  # diffusers' flow pipelines round up to a whole step by themselves

    def shift(self, flow_shift: float) -> float:
        return math.exp(flow_shift)

    def prepare(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:  # noqa: ARG002
        # diffusers' inpainting pipeline (0.42) asks for a switch of FLUX.1's that Chroma's transformer lacks.
        pipeline.transformer.register_to_config(guidance_embeds=False)
        return {}

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return len(pipeline.tokenizer(text, verbose=False).input_ids) > _PROMPT_TOKENS

    def latents(self, pipeline: Any, latents: Any, parameters: Parameters) -> Any:
        return super().latents(pipeline, unpacked(pipeline, latents, parameters), parameters)


def transformer(kind: str, config_dir: Path) -> Part:
    """Chroma's denoiser, in its own naming, which is FLUX.1's (GGUF files keep it), and in diffusers'."""
    config = read_json(config_dir / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    guidance = (config["approximator_hidden_dim"], config["approximator_num_channels"])
    reads, context = (width, config["in_channels"]), (width, config["joint_attention_dim"])
    layers, single = config["num_layers"] - 1, config["num_single_layers"] - 1
    told = {"distilled_guidance_layer.in_proj.weight": guidance}
    original = told | {
        "img_in.weight": reads,
        "txt_in.weight": context,
        f"double_blocks.{layers}.img_attn.qkv.weight": (3 * width, width),
        f"single_blocks.{single}.linear2.weight": (width, 5 * width),
    }
    diffusers = told | {
        "x_embedder.weight": reads,
        "context_embedder.weight": context,
        f"transformer_blocks.{layers}.attn.to_q.weight": (width, width),
        f"single_transformer_blocks.{single}.proj_out.weight": (width, 5 * width),
    }
    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.ChromaTransformer2DModel",
        config=config_dir,
        layouts=(Layout("original", original, from_black_forest), Layout("diffusers", diffusers)),
    )


def chroma(
    name: str = "chroma",
    denoiser: Path = CONFIGS / "chroma" / "transformer",
    text_encoder: Path = CONFIGS / "t5" / "text_encoder",
    vae: Path = CONFIGS / "vae-16",
) -> Chroma:
    """The family of the sizes that the configurations say."""
    return Chroma(
        name=name,
        parts={
            "transformer": transformer(f"{name} transformer", denoiser),
            "text_encoder": t5("text encoder (T5-XXL)", text_encoder),
            "vae": kl_vae("16-channel VAE (ae.safetensors)", vae),
        },
        tokenizers={"tokenizer": T5_TOKENIZER},
        # FLUX.1 dev's: a shift of 0.5 to 1.15 by the picture's size. stable-diffusion.cpp has 1 for every
        # size, which flowShift can say.
        scheduler=CONFIGS / "flux1" / "scheduler",
        pipelines=Pipelines(
            text="ChromaPipeline", image="ChromaImg2ImgPipeline", inpaint="ChromaInpaintPipeline"
        ),
        flow=True,
        halves=("bfloat16", "float16"),
        defaults=EngineDefaults(width=1024, height=1024, guidance=4.0, sampler="euler", size_multiple=16),
    )


CHROMA = chroma()
