"""Modules without memory for weights."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from studio_worker.engine.families.component import CONFIGS


def sd1_parts() -> tuple[Any, Any, Any]:
    """UNet, VAE and text encoder of Stable Diffusion 1.x without memory for weights."""
    with init_empty_weights():
        return (
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD1 / "unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(SD1 / "vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(SD1 / "text_encoder")),
        )


SD1 = CONFIGS / "sd1"
