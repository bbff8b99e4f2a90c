"""FLUX.1: dev, schnell and Fill; and Kontext, whose weights are shaped like dev's: an edit is what tells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studio_worker.engine.families.black_forest import from_black_forest
from studio_worker.engine.families.component import CONFIGS, Layout, Part, read_json
from studio_worker.engine.families.family import Family, Pipelines, unpacked
from studio_worker.engine.families.parts import clip, clip_tokenizer, kl_vae
from studio_worker.engine.families.t5 import T5_TOKENIZER, t5
from studio_worker.engine.parameters import EngineDefaults, Parameters
from studio_worker.errors import JobImpossible

DISTILLED_GUIDANCE = 3.5
"""What dev and Kontext are told their guidance is (their model cards, and stable-diffusion.cpp's default)."""

FILL_GUIDANCE = 30.0
"""What Fill is told (its model card)."""


@dataclass(frozen=True, kw_only=True)
class Flux(Family):
    """CLIP's pooled prompt and T5's tokens; packed latents; guidance that the model was distilled with.

    A task's cfgScale is true classifier-free guidance, as in stable-diffusion.cpp: 1 means none, and takes
    half the time. The distilled guidance is the model card's.

    Args:
        distilled_guidance: what the model is told.
        prompt_tokens: how many of T5's tokens the model was trained with.
    """

    flow: bool = True
    halves: tuple[str, ...] = ("bfloat16", "float16")
    distilled_guidance: float = DISTILLED_GUIDANCE
    prompt_tokens: int = 512

    def encode(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        prompts = {"": parameters.prompt}
        if parameters.guidance > 1:
            prompts["negative_"] = parameters.negative_prompt
        encoded: dict[str, Any] = {}
        for prefix, text in prompts.items():
            embeddings, pooled, _ = pipeline.encode_prompt(
                prompt=text, prompt_2=None, max_sequence_length=self.prompt_tokens
            )
            encoded |= {f"{prefix}prompt_embeds": embeddings, f"{prefix}pooled_prompt_embeds": pooled}
        return encoded

    def guidance(self, parameters: Parameters) -> dict[str, Any]:
        return {"guidance_scale": self.distilled_guidance, "true_cfg_scale": parameters.guidance}

    def shift(self, flow_shift: float) -> float:
        return math.exp(flow_shift)

    def prepare(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        if "Kontext" not in type(pipeline).__name__:
            return {}
        # Else it makes a picture of a million pixels whatever size is asked for.
        return {"max_area": parameters.width * parameters.height}

    def strength(self, parameters: Parameters) -> float:
        return parameters.denoise or 1.0  # diffusers' flow pipelines round up to a whole step by themselves

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return len(pipeline.tokenizer_2(text, verbose=False).input_ids) > self.prompt_tokens

    def latents(self, pipeline: Any, latents: Any, parameters: Parameters) -> Any:
        return super().latents(pipeline, unpacked(pipeline, latents, parameters), parameters)


@dataclass(frozen=True, kw_only=True)
class Fill(Flux):
    """FLUX.1 Fill: paints within a mask and nothing else; it has no true classifier-free guidance."""

    halves: tuple[str, ...] = ("bfloat16",)
    distilled_guidance: float = FILL_GUIDANCE

    def check(self, parameters: Parameters) -> None:
        super().check(parameters)
        if parameters.guidance != 1:
            raise JobImpossible(
                f"{self.name} has no classifier-free guidance but a built-in one, which is "
                f"{self.distilled_guidance:g}: cfgScale must be 1, not {parameters.guidance:g}"
            )

    def guidance(self, parameters: Parameters) -> dict[str, Any]:  # noqa: ARG002
        return {"guidance_scale": self.distilled_guidance}


def transformer(kind: str, config_dir: Path) -> Part:
    """FLUX.1's denoiser, in Black Forest Labs' naming (GGUF files keep it) and in diffusers'."""
    config = read_json(config_dir / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    reads, layers, single = config["in_channels"], config["num_layers"], config["num_single_layers"]
    context, pooled = (width, config["joint_attention_dim"]), (width, config["pooled_projection_dim"])
    modulation = (6 * width, width)
    original = {
        "img_in.weight": (width, reads),
        "txt_in.weight": context,
        "vector_in.in_layer.weight": pooled,
        f"double_blocks.{layers - 1}.img_mod.lin.weight": modulation,
        f"single_blocks.{single - 1}.modulation.lin.weight": (3 * width, width),
    }
    diffusers = {
        "x_embedder.weight": (width, reads),
        "context_embedder.weight": context,
        "time_text_embed.text_embedder.linear_1.weight": pooled,
        f"transformer_blocks.{layers - 1}.norm1.linear.weight": modulation,
        f"single_transformer_blocks.{single - 1}.norm.linear.weight": (3 * width, width),
    }
    told = {
        "original": "guidance_in.in_layer.weight",
        "diffusers": "time_text_embed.guidance_embedder.linear_1.weight",
    }
    absent = {layout: () if config["guidance_embeds"] else (name,) for layout, name in told.items()}
    if config["guidance_embeds"]:
        original[told["original"]] = diffusers[told["diffusers"]] = (width, None)
    return Part(
        kind=kind,
        role="diffusion-model",
        cls="diffusers.FluxTransformer2DModel",
        config=config_dir,
        layouts=(
            Layout("original", original, from_black_forest, absent["original"]),
            Layout("diffusers", diffusers, without=absent["diffusers"]),
        ),
    )


_PIPELINES = Pipelines(
    text="FluxPipeline",
    image="FluxImg2ImgPipeline",
    inpaint="FluxInpaintPipeline",
    edit="FluxKontextPipeline",
)
_DEFAULTS = EngineDefaults(width=1024, height=1024, guidance=1.0, sampler="euler", size_multiple=16)


def flux(name: str, folders: Mapping[str, Path], cls: type[Flux] = Flux, **options: Any) -> Flux:
    """A family of FLUX.1 models.

    Args:
        name: what operators call it.
        folders: of the configurations of its parts, scheduler and tokenizers, by the pipelines' names.
        options: what of :class:`Flux` is not as dev's.
    """
    return cls(
        **{
            "name": name,
            "parts": {
                "transformer": transformer(f"{name} transformer", folders["transformer"]),
                "text_encoder": clip("text encoder (CLIP-L)", folders["text_encoder"]),
                "text_encoder_2": t5("text encoder (T5-XXL)", folders["text_encoder_2"]),
                "vae": kl_vae("16-channel VAE (ae.safetensors)", folders["vae"]),
            },
            "tokenizers": {
                "tokenizer": clip_tokenizer(folders["tokenizer"], folders["text_encoder"]),
                "tokenizer_2": T5_TOKENIZER,
            },
            "scheduler": folders["scheduler"],
            "pipelines": _PIPELINES,
            "reference_pixels": 1024 * 1024,  # Kontext's PREFERRED_KONTEXT_RESOLUTIONS
            "defaults": _DEFAULTS,
            **options,
        }
    )


FOLDERS: Mapping[str, Path] = {
    "transformer": CONFIGS / "flux1" / "dev",
    "scheduler": CONFIGS / "flux1" / "scheduler",
    "text_encoder": CONFIGS / "sd1" / "text_encoder",
    "text_encoder_2": CONFIGS / "t5" / "text_encoder",
    "tokenizer": CONFIGS / "sd1" / "tokenizer",
    "vae": CONFIGS / "vae-16",
}
"""dev's; CLIP-L is Stable Diffusion 1's text encoder."""

FLUX_DEV = flux("flux1-dev", FOLDERS)
FLUX_SCHNELL = flux(
    "flux1-schnell",
    {
        **FOLDERS,
        "transformer": CONFIGS / "flux1" / "schnell",
        "scheduler": CONFIGS / "flux1" / "scheduler_schnell",
    },
    pipelines=replace(_PIPELINES, edit=None),
    prompt_tokens=256,
)
FLUX_FILL = flux(
    "flux1-fill",
    {**FOLDERS, "transformer": CONFIGS / "flux1" / "fill"},
    Fill,
    pipelines=Pipelines(text=None, inpaint="FluxFillPipeline"),
)
FLUX_FAMILIES = (FLUX_DEV, FLUX_SCHNELL, FLUX_FILL)
