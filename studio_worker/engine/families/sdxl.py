"""Stable Diffusion XL, base and turbo, its inpainting model, and models of its kind that predict v.

Models that predict v say so by a tensor called ``v_pred``, and by ``ztsnr`` that their noise ends in pure
noise (zero terminal SNR): trainers put them there for programs to see, ComfyUI first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.engine.families import clip_prompts
from studio_worker.engine.families.component import CONFIGS, Tokenizer
from studio_worker.engine.families.family import Family, Pipelines
from studio_worker.engine.families.parts import clip, clip_tokenizer, kl_vae, unet
from studio_worker.engine.parameters import EngineDefaults, Parameters
from studio_worker.engine.sections import Section

_PLAYGROUND = "edm_mean"
"""Playground 2.5 is shaped like it and has another noise schedule; by this tensor it tells itself."""

_LAST_BUT_ONE = -2
"""The hidden state of both text encoders that the UNet was trained with."""


@dataclass(frozen=True, kw_only=True)
class StableDiffusionXL(Family):
    """Two text encoders side by side, the second's pooled embedding, and the picture's size as conditions.

    Args:
        markers: names of tensors that tell this variant, anywhere in the source.
    """

    markers: frozenset[str] = frozenset()

    def fits(self, sections: Iterable[Section]) -> bool:
        sections = list(sections)
        found = {name for section in sections for name in section.shapes}
        return self.markers <= found and _PLAYGROUND not in found and super().fits(sections)

    def encode(self, pipeline: Any, parameters: Parameters) -> dict[str, Any]:
        encoders = [
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ]
        texts = [parameters.prompt, parameters.negative_prompt][: 2 if parameters.guidance > 1 else 1]
        found = clip_prompts.embeddings(encoders, texts, layer=_LAST_BUT_ONE)
        arguments = {}
        for prefix, (embeds, pooled) in zip(("", "negative_"), found, strict=False):
            # No negative prompt is a condition of zeros, as in diffusers and stable-diffusion.cpp.
            keep = 1.0 if parameters.negative_prompt or not prefix else 0.0
            arguments[f"{prefix}prompt_embeds"] = embeds * keep
            arguments[f"{prefix}pooled_prompt_embeds"] = pooled * keep
        return arguments

    def is_truncated(self, pipeline: Any, text: str) -> bool:
        return clip_prompts.is_truncated(pipeline.tokenizer, text)


@dataclass(frozen=True)
class Folders:
    """Where the configurations of one size of the family are."""

    unet: Path = CONFIGS / "sdxl" / "unet"
    text_encoder: Path = CONFIGS / "sd1" / "text_encoder"
    text_encoder_2: Path = CONFIGS / "sdxl" / "text_encoder_2"
    vae: Path = CONFIGS / "sdxl" / "vae"
    tokenizer: Path = CONFIGS / "sd1" / "tokenizer"
    scheduler: Path = CONFIGS / "sd1" / "scheduler"


def sdxl(
    name: str,
    folders: Folders = Folders(),
    *,
    only_inpainting: bool = False,
    markers: frozenset[str] = frozenset(),
) -> StableDiffusionXL:
    """The family of the sizes that the configurations say."""
    return StableDiffusionXL(
        name=name,
        parts={
            "unet": unet(f"{name} UNet", folders.unet),
            "text_encoder": clip("text encoder CLIP-L", folders.text_encoder),
            "text_encoder_2": clip("text encoder CLIP-G", folders.text_encoder_2, projected=True),
            "vae": kl_vae("sdxl VAE", folders.vae),
        },
        tokenizers=_tokenizers(folders),
        scheduler=folders.scheduler,
        pipelines=Pipelines(
            text=None if only_inpainting else "StableDiffusionXLPipeline",
            image=None if only_inpainting else "StableDiffusionXLImg2ImgPipeline",
            inpaint="StableDiffusionXLInpaintPipeline",
        ),
        fixed={"add_watermarker": False, "force_zeros_for_empty_prompt": True},
        defaults=EngineDefaults(width=1024, height=1024),
        markers=markers,
    )


def _tokenizers(folders: Folders) -> dict[str, Tokenizer]:
    return {
        "tokenizer": clip_tokenizer(folders.tokenizer, folders.text_encoder),
        # open_clip pads with the token of number 0.
        "tokenizer_2": clip_tokenizer(folders.tokenizer, folders.text_encoder_2, pad_token="!"),
    }


SDXL = sdxl("sdxl")
SDXL_V = sdxl("sdxl-v", Folders(scheduler=CONFIGS / "sdxl-v" / "scheduler"), markers=frozenset({"v_pred"}))
SDXL_V_ZSNR = sdxl(
    "sdxl-v-zsnr",
    Folders(scheduler=CONFIGS / "sdxl-v-zsnr" / "scheduler"),
    markers=frozenset({"v_pred", "ztsnr"}),
)
SDXL_INPAINT = sdxl("sdxl-inpaint", Folders(unet=CONFIGS / "sdxl-inpaint" / "unet"), only_inpainting=True)
