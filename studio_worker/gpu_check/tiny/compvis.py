"""From diffusers' names to those of Stable Diffusion's published files: CompVis' latent-diffusion, open_clip.

The inverse of diffusers' ``convert_ldm_unet_checkpoint`` and ``convert_ldm_vae_checkpoint``. Works for any
number of levels, unlike the conversion scripts written for Stable Diffusion's four. The sample model's
training writes with it, too.
"""

from __future__ import annotations

import re

import torch

from studio_worker.engine.families.parts.layer_names import comp_vis
from studio_worker.gpu_check.tiny.weights import State, Tensors, prefixed

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


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


def unet(state: State) -> Tensors:
    """A UNet's tensors, those of Stability's SDXL included. diffusers' own conversion reads them back."""
    stems = {name.rpartition(".")[0] for name in state}
    published = {named.layers[0]: name for name, named in comp_vis(stems).items()}
    renamed = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        renamed[f"{published[stem]}.{kind}"] = tensor
    return renamed


def vae(state: State, levels: int) -> Tensors:
    """A VAE's tensors, as ``ae.safetensors`` has them too.

    Args:
        levels: how many resolutions it has.
    """
    renamed = {}
    for name, tensor in state.items():
        new = _vae_name(name, levels)
        # The original's attention is made of 1x1 convolutions.
        is_matrix = ".attn_1." in new and tensor.ndim == 2
        renamed[new] = tensor[:, :, None, None] if is_matrix else tensor
    return renamed


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip(state: State) -> Tensors:
    """A CLIP text encoder's tensors under open_clip's names, as SD 2.x and SDXL checkpoints have them.

    Source: open_clip's ``CLIP`` (``torch.nn.MultiheadAttention`` with its fused ``in_proj``), and the logit
    scale that those files carry besides.
    """
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {"logit_scale": torch.tensor(1.0)}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
        elif name in _OPEN_CLIP:
            renamed[_OPEN_CLIP[name]] = tensor
        elif name.startswith("encoder.layers."):
            _, _, block, rest = name.split(".", 3)
            stem, _, kind = rest.rpartition(".")
            place = f"transformer.resblocks.{block}"
            if stem in _OPEN_CLIP_BLOCK:
                renamed[f"{place}.{_OPEN_CLIP_BLOCK[stem]}.{kind}"] = tensor
            elif stem == "self_attn.q_proj":
                parts = [state[f"encoder.layers.{block}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
                renamed[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
    return renamed


def single_file(unet_state: State, vae_state: State, text_encoder: State, *, vae_levels: int) -> Tensors:
    """All weights of a Stable Diffusion pipeline under their original names, in half precision.

    Args:
        unet_state, vae_state, text_encoder: diffusers' and transformers' state dicts.
        vae_levels: how many resolutions the VAE has.
    """
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text_encoder.items()}
    state = {
        **prefixed(unet(unet_state), "model.diffusion_model."),
        **prefixed(vae(vae_state, vae_levels), "first_stage_model."),
        **prefixed(text, "cond_stage_model.transformer."),
    }
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in sorted(state.items())}
