"""Stable Diffusion XL, base and turbo, its inpainting model, and models of its kind that predict v.

Models that predict v say so by a tensor called ``v_pred``, and by ``ztsnr`` that their noise ends in pure
noise (zero terminal SNR): trainers put them there for programs to see, ComfyUI first. Others say it in their
file's metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Tokenizer
from studio_worker.engine.families.family import Pipelines, Seen
from studio_worker.engine.families.parts import clip_prompts
from studio_worker.engine.families.parts.common import clip, clip_tokenizer, kl_vae, unet
from studio_worker.engine.families.parts.unet import UNetFamily
from studio_worker.engine.files.sections import Section
from studio_worker.engine.parameters import UNET_PX, EngineDefaults, Parameters

_OTHERS = {"edm_mean", "edm_vpred.sigma_max"}
"""Playground 2.5 and CosXL are shaped like it and have other noise schedules; by these tensors they tell
themselves.
"""

_LAST_BUT_ONE = -2
"""The hidden state of both text encoders that the UNet was trained with."""


@dataclass(frozen=True, kw_only=True)
class StableDiffusionXL(UNetFamily):
    """Two text encoders side by side, the second's pooled embedding, and the picture's size as conditions."""

    def fits(self, sections: Iterable[Section]) -> bool:
        sections = list(sections)
        return not any(_OTHERS & section.shapes.keys() for section in sections) and super().fits(sections)

    def read(
        self,
        pipeline: Any,
        texts: Sequence[str],
        device: Any,
        reference: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        encoders = [
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ]
        found = clip_prompts.embeddings(encoders, texts, device, layer=_LAST_BUT_ONE)
        read = [{"prompt_embeds": embeds, "text_embeds": pooled} for embeds, pooled in found]
        if len(texts) > 1 and not texts[1]:
            # No negative prompt is a condition of zeros, but for what sums it up: stable-diffusion.cpp's way.
            read[1]["prompt_embeds"] = read[1]["prompt_embeds"] * 0.0
        return read

    def prepare(
        self,
        pipeline: Any,
        parameters: Parameters,
        seen: Seen,
        prompts: Mapping[str, dict[str, Any]],
        device: Any,
    ) -> list[dict[str, Any]]:
        import torch

        size = [parameters.height, parameters.width]
        # What was trained: a picture's size before it was cropped, where it was cropped, and its size then.
        told = torch.tensor([[*size, 0, 0, *size]]).to(device)
        arguments = super().prepare(pipeline, parameters, seen, prompts, device)
        return [each | {"time_ids": told.to(each["text_embeds"].dtype)} for each in arguments]

    def added(self, arguments: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        import torch

        return {name: torch.cat([each[name] for each in arguments]) for name in ("text_embeds", "time_ids")}


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
        defaults=EngineDefaults(width=1024, height=1024, size_multiple=UNET_PX),
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
