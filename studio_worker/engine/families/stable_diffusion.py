"""Stable Diffusion 1.x and 2.x, their inpainting models, and the sample model, which is a small one.

Whether a 2.x model predicts noise or v (velocity) is in no name and no shape. It is told as ComfyUI tells it
(``comfy/supported_models.py``, SD20): one bias of the last attention spreads more in models trained for v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker import sample_model
from studio_worker.engine.families.component import CONFIGS
from studio_worker.engine.families.family import Pipelines
from studio_worker.engine.families.parts import clip_prompts
from studio_worker.engine.families.parts.common import clip, clip_tokenizer, kl_vae, unet
from studio_worker.engine.families.parts.unet import UNetFamily
from studio_worker.engine.parameters import UNET_PX, EngineDefaults
from studio_worker.engine.sampling.levels import Diffusion, Scale

_PIPELINES = Pipelines(
    text="StableDiffusionPipeline",
    image="StableDiffusionImg2ImgPipeline",
    inpaint="StableDiffusionInpaintPipeline",
)

_VELOCITY_SPREAD = 0.09
"""ComfyUI's threshold for the standard deviation of that bias."""


@dataclass(frozen=True, kw_only=True)
class StableDiffusion(UNetFamily):
    """One text encoder, a UNet that predicts noise, a VAE of four channels."""

    def read(
        self,
        pipeline: Any,
        texts: Sequence[str],
        device: Any,
        reference: Any,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        found = clip_prompts.embeddings([(pipeline.tokenizer, pipeline.text_encoder)], texts, device)
        return [{"prompt_embeds": embeds} for embeds, _ in found]


@dataclass(frozen=True, kw_only=True)
class StableDiffusion2(StableDiffusion):
    """The same of other sizes, predicting noise or v."""

    @property
    def predicts_v(self) -> bool:
        return True

    def scale(self, shipped: Any, parts: Mapping[str, Any], flow_shift: float | None) -> Scale:  # noqa: ARG002
        biases = [
            parameter
            for name, parameter in parts["unet"].named_parameters()
            if name.startswith("up_blocks.") and name.endswith(".transformer_blocks.0.norm1.bias")
        ]
        spread = float(biases[-1].float().std(unbiased=False))
        return Diffusion(tuple(shipped.alphas_cumprod.tolist()), spread > _VELOCITY_SPREAD)


def stable_diffusion(
    name: str,
    config_dir: Path,
    cls: type[StableDiffusion] = StableDiffusion,
    *,
    unet_dir: Path | None = None,
    pipelines: Pipelines = _PIPELINES,
    base: Path | None = None,
    **tokenizer: Any,
) -> StableDiffusion:
    """The family of Stable Diffusion models of the sizes that the configuration says.

    Args:
        config_dir: the folder of ``text_encoder``, and of all else that no other folder is given for.
        unet_dir: where the UNet's configuration is.
        base: the folder of ``vae``, ``tokenizer`` and ``scheduler``.
        tokenizer: options of the tokenizer.
    """
    base = base or config_dir
    text_encoder = config_dir / "text_encoder"
    return cls(
        name=name,
        parts={
            "unet": unet(f"{name} UNet", unet_dir or config_dir / "unet"),
            "text_encoder": clip(f"{name} text encoder (CLIP)", text_encoder),
            "vae": kl_vae(f"{name} VAE", base / "vae"),
        },
        tokenizers={"tokenizer": clip_tokenizer(base / "tokenizer", text_encoder, **tokenizer)},
        scheduler=base / "scheduler",
        pipelines=pipelines,
        defaults=EngineDefaults(size_multiple=UNET_PX),
        fixed={
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
    )


INPAINTING = Pipelines(text=None, inpaint="StableDiffusionInpaintPipeline")
"""UNets of nine channels also see the mask and what it leaves of the picture; they have no other use."""

SD1 = stable_diffusion("sd1", CONFIGS / "sd1")
SD1_INPAINT = stable_diffusion(
    "sd1-inpaint", CONFIGS / "sd1", unet_dir=CONFIGS / "sd1-inpaint" / "unet", pipelines=INPAINTING
)
# The tokenizer of 2.x is CLIP's, padded with the token of number 0 as open_clip does.
SD2 = stable_diffusion("sd2", CONFIGS / "sd2", StableDiffusion2, base=CONFIGS / "sd1", pad_token="!")
SD2_INPAINT = stable_diffusion(
    "sd2-inpaint",
    CONFIGS / "sd2",
    unet_dir=CONFIGS / "sd2-inpaint" / "unet",
    pipelines=INPAINTING,
    base=CONFIGS / "sd1",
    pad_token="!",
)
SAMPLE = stable_diffusion("sample", Path(sample_model.CONFIG_DIR))
