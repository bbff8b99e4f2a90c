"""From diffusers' names to the original Stable Diffusion single-file names (the inverse of its loader).

Works for any number of levels, unlike the conversion scripts written for Stable Diffusion's four.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

State = Mapping[str, torch.Tensor]

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet_name(name: str, per_block: int, attends: Mapping[int, bool]) -> str:
    """One UNet name; attends tells for each up block whether attention sits before its upsampler."""
    stem, _, kind = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        part, index, rest = match[1], int(match[2]), match[3]
        place = f"middle_block.{2 * index if part == 'resnets' else 2 * index + 1}"
    elif match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", name):
        block, part, layer, rest = int(match[2]), match[3], int(match[4]), match[5]
        number = block * (per_block + 1) + layer
        place = f"input_blocks.{number + 1}" if match[1] == "down" else f"output_blocks.{number}"
        place += ".0" if part == "resnets" else ".1"
    elif match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{(int(match[1]) + 1) * (per_block + 1)}.0.op.{match[2]}"
    elif match := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.(conv\..+)", name):
        block = int(match[1])
        return f"output_blocks.{(block + 1) * (per_block + 1) - 1}.{2 if attends[block] else 1}.{match[2]}"
    else:
        raise KeyError(name)
    if part == "resnets":
        layer_name, _, tensor = rest.partition(".")
        rest = f"{_UNET_RESNET[layer_name]}.{tensor}"
    return f"{place}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    match = re.fullmatch(r"(encoder|decoder)\.(.+)", name)
    if match is None:
        return name  # quant_conv, post_quant_conv
    half, rest = match[1], match[2]
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if inner := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", rest):
        rest = f"mid.block_{int(inner[1]) + 1}.{inner[2]}"
    elif inner := re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", rest):
        rest = f"mid.attn_1.{_VAE_ATTENTION[inner[1]]}.{inner[2]}"
    elif inner := re.fullmatch(r"(down|up)_blocks\.(\d)\.(.+)", rest):
        level = int(inner[2]) if inner[1] == "down" else levels - 1 - int(inner[2])
        tail = inner[3].replace("resnets.", "block.")
        tail = tail.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
        rest = f"{inner[1]}.{level}.{tail}"
    return f"{half}.{rest}"


def single_file_state(
    unet: State, vae: State, text_encoder: State, *, layers_per_block: int, vae_levels: int
) -> dict[str, torch.Tensor]:
    """All weights of a Stable Diffusion pipeline under their original names, in half precision.

    Args:
        unet, vae, text_encoder: diffusers' and transformers' state dicts.
        layers_per_block: the UNet's.
        vae_levels: how many resolutions the VAE has.
    """
    attends = {
        block: any(name.startswith(f"up_blocks.{block}.attentions") for name in unet) for block in range(9)
    }
    state: dict[str, torch.Tensor] = {}
    for name, tensor in unet.items():
        state[f"model.diffusion_model.{_unet_name(name, layers_per_block, attends)}"] = tensor
    for name, tensor in vae.items():
        ldm_name = _vae_name(name, vae_levels)
        if ".attn_1." in ldm_name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # the original's attention is made of 1x1 convolutions
        state[f"first_stage_model.{ldm_name}"] = tensor
    for name, tensor in text_encoder.items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in sorted(state.items())}
