"""A tiny random twin of every family that is served: the same classes, files and way, other sizes.

For tests of what holds for all of them. Files have the libraries' own names; what published ones are called
is tested where each family is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from studio_worker.engine.families import FAMILIES, sd3, sdxl
from studio_worker.engine.families.chroma import chroma
from studio_worker.engine.families.component import CONFIGS, Part, read_json
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.flux import FOLDERS as FLUX_FOLDERS
from studio_worker.engine.families.flux import flux
from studio_worker.engine.families.qwen_image import FOLDERS as QWEN_FOLDERS
from studio_worker.engine.families.qwen_image import ZERO_COND_T, qwen_image
from studio_worker.engine.families.stable_diffusion import stable_diffusion
from studio_worker.engine.families.z_image import z_image
from studio_worker.models import LocalFile
from tests.flow_models import CLIP, T5, VAE, config, drawn, safetensors, state

WIDE_CLIP = CLIP | {"hidden_act": "gelu"}
VAE_4 = VAE | {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
VAE_16 = VAE | {"latent_channels": 16}

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
}
XL = UNET | {
    "cross_attention_dim": 64,
    "transformer_layers_per_block": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
NINE = {"in_channels": 9}
"""What a UNet made for inpainting reads: latents, the mask, and what it leaves of the picture."""

FLUX: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
CHROMA: dict[str, Any] = {
    "_class_name": "ChromaTransformer2DModel",
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 6, 6],
    "approximator_num_channels": 32,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}
SD3: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_projection_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 8,
    "dual_attention_layers": [],
    "qk_norm": None,
}
Z_IMAGE: dict[str, Any] = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [8, 12, 12],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 32,
    "dim": 64,
    "in_channels": 16,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 1,
    "n_refiner_layers": 1,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
QWEN_IMAGE: dict[str, Any] = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 6, 6],
}
QWEN_VL: dict[str, Any] = {
    "model_type": "qwen2_5_vl_text",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
    "vocab_size": 151_936,
}
VISION: dict[str, Any] = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "fullatt_block_indexes": [0],
    "tokens_per_second": 2,
}
QWEN_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLQwenImage",
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "input_channels": 3,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.1, 0.9, 1.3, 1.0],
}


@dataclass(frozen=True)
class Twin:
    """A tiny family and its files."""

    family: Family
    files: tuple[LocalFile, ...]


def tiny_families(folder: Path) -> Mapping[str, Family]:
    """The twins by the name of the family they are of."""
    made = {family.name: family for family in _made(folder)}
    assert set(made) | {"sample"} == {family.name for family in FAMILIES}
    return made


def _made(folder: Path) -> list[Family]:
    def at(name: str, content: Mapping[str, Any]) -> Path:
        return config(folder / name, content)

    clip, clip_g, t5 = at("clip", CLIP), at("clip-g", WIDE_CLIP), at("t5", T5)
    vae = at("vae", VAE)
    flux_folders = {**FLUX_FOLDERS, "text_encoder": clip, "text_encoder_2": t5, "vae": vae}
    qwen_folders = {
        **QWEN_FOLDERS,
        "text_encoder": at("qwen-vl", QWEN_VL),
        "vision": at("vision", VISION),
        "vae": at("qwen-vae", QWEN_VAE),
    }
    qwen_2511 = at("qwen-2511", QWEN_IMAGE | {"zero_cond_t": True})
    return [
        *_stable_diffusion(folder),
        *_xl(folder, clip, clip_g),
        *(
            sd3.sd3(
                published.name,
                sd3.Folders(
                    transformer=at(published.name, SD3 | numbers),
                    text_encoder=clip,
                    text_encoder_2=clip_g,
                    text_encoder_3=at("wide-t5", T5 | {"d_model": 64}),
                    vae=at("vae-16", VAE_16),
                ),
            )
            for published, numbers in (
                (sd3.SD3_MEDIUM, {}),
                (sd3.SD35_LARGE, {"qk_norm": "rms_norm"}),
                (sd3.SD35_MEDIUM, {"qk_norm": "rms_norm", "dual_attention_layers": [0]}),
            )
        ),
        *(
            flux(
                published.name,
                {
                    **flux_folders,
                    "transformer": at(published.name, FLUX | numbers),
                    "scheduler": published.scheduler,
                },
                type(published),
                pipelines=published.pipelines,
                prompt_tokens=published.prompt_tokens,
            )
            for published, numbers in _flux_variants()
        ),
        chroma("chroma", at("chroma", CHROMA), t5, vae),
        z_image("z-image", at("z-image", Z_IMAGE), at("qwen3", QWEN3), at("vae-16", VAE_16)),
        qwen_image("qwen-image", {**qwen_folders, "transformer": at("qwen-image", QWEN_IMAGE)}),
        qwen_image("qwen-image-edit-2511", {**qwen_folders, "transformer": qwen_2511}),
    ]


def _flux_variants() -> list[tuple[Any, Mapping[str, Any]]]:
    from studio_worker.engine.families.flux import FLUX_DEV, FLUX_FILL, FLUX_SCHNELL

    # Fill reads latents, those of the picture under the mask, and 8x8 pixels of mask for each of 4.
    fill = {"in_channels": 16 + 16 + 4 * 64, "out_channels": 16}
    return [(FLUX_DEV, {}), (FLUX_SCHNELL, {"guidance_embeds": False}), (FLUX_FILL, fill)]


def _stable_diffusion(folder: Path) -> list[Family]:
    base = folder / "sd"
    config(base / "text_encoder", CLIP)
    config(base / "vae", VAE_4)
    for name in ("tokenizer", "scheduler"):
        if not (base / name).exists():
            (base / name).symlink_to(CONFIGS / "sd1" / name)
    unets = {"sd1": UNET, "sd1-inpaint": UNET | NINE, "sd2": UNET, "sd2-inpaint": UNET | NINE}
    published = {family.name: family for family in FAMILIES}
    return [
        stable_diffusion(
            name,
            base,
            type(published[name]),  # type: ignore[arg-type]
            unet_dir=config(folder / name, numbers),
            pipelines=published[name].pipelines,
            **({"pad_token": "!"} if "sd2" in name else {}),
        )
        for name, numbers in unets.items()
    ]


def _xl(folder: Path, clip: Path, clip_g: Path) -> list[Family]:
    vae = config(folder / "xl-vae", VAE_4 | {"scaling_factor": 0.13025})

    def like(published: sdxl.StableDiffusionXL, numbers: Mapping[str, Any], **options: Any) -> Family:
        folders = sdxl.Folders(
            config(folder / published.name, numbers),
            text_encoder=clip,
            text_encoder_2=clip_g,
            vae=vae,
            scheduler=published.scheduler,
        )
        return sdxl.sdxl(published.name, folders, markers=published.markers, **options)

    return [
        like(sdxl.SDXL, XL),
        like(sdxl.SDXL_V, XL),
        like(sdxl.SDXL_V_ZSNR, XL),
        like(sdxl.SDXL_INPAINT, XL | NINE, only_inpainting=True),
    ]


def twin(family: Family, folder: Path) -> Twin:
    """``family`` with a file for each of its parts, of drawn numbers."""
    markers = {name: torch.zeros(1) for name in getattr(family, "markers", ())}
    files = [
        _file(part, seed, folder, {} if seed else markers) for seed, part in enumerate(family.parts.values())
    ]
    return Twin(family, tuple(files))


def _file(part: Part, seed: int, folder: Path, markers: Mapping[str, torch.Tensor]) -> LocalFile:
    path = folder / f"{part.config.parent.name}-{part.config.name}-{part.role}.safetensors"
    if path.exists():
        return LocalFile(part.role, path, path.name)
    library, name = part.cls.split(".")
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    numbers = read_json(part.config / "config.json")
    torch.manual_seed(seed)
    model = cls.from_config(numbers) if library == "diffusers" else cls(cls.config_class.from_dict(numbers))
    tensors = state(drawn(model, seed))
    if "CLIP" in name:
        tensors = {
            name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": tensor
            for name, tensor in tensors.items()
        }
    elif name.endswith(("Qwen3Model", "TextModel")):
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    if numbers.get("zero_cond_t"):
        tensors[ZERO_COND_T] = torch.zeros(0)
    return safetensors(path, part.role, tensors | markers)
