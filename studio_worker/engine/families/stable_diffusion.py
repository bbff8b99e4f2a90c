"""Stable Diffusion 1.x, and the sample model, which is a small one of its kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker import sample_model
from studio_worker.engine.families import clip_prompts
from studio_worker.engine.families.family import CONFIGS, Family, Pipelines
from studio_worker.engine.families.parts import clip, clip_tokenizer, kl_vae, unet
from studio_worker.engine.parameters import Parameters

_PIPELINES = Pipelines(
    text="StableDiffusionPipeline",
    image="StableDiffusionImg2ImgPipeline",
    inpaint="StableDiffusionInpaintPipeline",
)


@dataclass(frozen=True, kw_only=True)
class StableDiffusion(Family):
    """One text encoder, a UNet that predicts noise, a VAE of four channels."""

    def encode(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        texts = [parameters.prompt, parameters.negative_prompt][: 2 if parameters.guidance > 1 else 1]
        found = clip_prompts.embeddings([(pipeline.tokenizer, pipeline.text_encoder)], texts)
        names = ("prompt_embeds", "negative_prompt_embeds")
        return {name: embeds for name, (embeds, _) in zip(names, found, strict=False)}

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return clip_prompts.is_truncated(pipeline.tokenizer, text)


def stable_diffusion(name: str, config_dir: Path) -> StableDiffusion:
    """The family of Stable Diffusion models of the sizes that the configuration says."""
    return StableDiffusion(
        name=name,
        parts={
            "unet": unet(f"{name} UNet", config_dir / "unet"),
            "text_encoder": clip(f"{name} text encoder (CLIP)", config_dir / "text_encoder"),
            "vae": kl_vae(f"{name} VAE", config_dir / "vae"),
        },
        tokenizers={"tokenizer": clip_tokenizer(config_dir / "tokenizer", config_dir / "text_encoder")},
        scheduler=config_dir / "scheduler",
        pipelines=_PIPELINES,
        fixed={
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
    )


SD1 = stable_diffusion("sd1", CONFIGS / "sd1")
SAMPLE = stable_diffusion("sample", Path(sample_model.CONFIG_DIR))
