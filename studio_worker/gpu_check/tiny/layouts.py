"""Flow models' tensors from diffusers' names to the names of their published files.

Each function is the inverse of what reads those files, and cites where the names come from.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from studio_worker.engine.families.parts.black_forest import PUBLISHED, SHIFT_BEFORE_SCALE
from studio_worker.gpu_check.tiny.weights import State, Tensors, renamed


def black_forest(tensors: Tensors) -> Tensors:
    """A FLUX.1 or Chroma transformer's tensors (diffusers' names) as the published files have them.

    Source: https://github.com/black-forest-labs/flux (src/flux/model.py, src/flux/modules/layers.py).
    """
    published: Tensors = {}
    left = dict(tensors)
    for module, targets in PUBLISHED.items():
        for block in _blocks(targets[0], tensors):
            for leaf in ("weight", "bias"):
                parts = [left.pop(f"{each.replace('.N.', block, 1)}.{leaf}", None) for each in targets]
                if parts[0] is None:
                    continue
                whole = torch.cat([part for part in parts if part is not None])
                if module == SHIFT_BEFORE_SCALE:
                    whole = whole.roll(whole.shape[0] // 2, 0)
                published[f"{module.replace('.N.', block, 1)}.{_leaf(module, leaf)}"] = whole
    # Chroma's norms of the guidance layer keep their module's name.
    for name, tensor in left.items():
        stem, _, leaf = name.rpartition(".")
        published[f"{stem}.{_leaf(stem, leaf)}"] = tensor
    return published


def _blocks(target: str, tensors: Iterable[str]) -> list[str]:
    before, found, _ = target.partition(".N.")
    if not found:
        return [""]
    numbers = {
        name.removeprefix(f"{before}.").split(".")[0] for name in tensors if name.startswith(f"{before}.")
    }
    return [f".{number}." for number in sorted(numbers, key=int)]


def _leaf(module: str, leaf: str) -> str:
    return "scale" if leaf == "weight" and ("_norm" in module or ".norms." in module) else leaf


def wan_vae(tensors: Tensors) -> Tensors:
    """An AutoencoderKLQwenImage's tensors (diffusers' names) as ``qwen_image_vae.safetensors`` has them.

    Source: https://github.com/Wan-Video/Wan2.1 (wan/modules/vae.py); the Comfy-Org repack of Qwen-Image keeps
    those names.
    """
    return {_wan_name(name): tensor for name, tensor in tensors.items()}


_WAN_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_WAN_ENDS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **{
        f"{half}.{ours}": f"{half}.{theirs}"
        for half in ("encoder", "decoder")
        for ours, theirs in (("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2"))
    },
}


def _wan_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _WAN_ENDS:
        return f"{_WAN_ENDS[module]}.{leaf}"
    half, place, *rest = module.split(".")
    if place == "mid_block":
        kind, index, *inner = rest
        if kind == "attentions":
            return f"{half}.middle.1.{'.'.join(inner)}.{leaf}"
        return f"{half}.middle.{2 * int(index)}.{_WAN_BLOCK[inner[0]]}.{leaf}"
    if place == "down_blocks":
        index, *inner = rest
        return f"{half}.downsamples.{index}.{_WAN_BLOCK.get(inner[0], '.'.join(inner))}.{leaf}"
    block, kind, index, *inner = rest  # up_blocks: three residual blocks and a step up, in one row
    if kind == "upsamplers":
        return f"{half}.upsamples.{4 * int(block) + 3}.{'.'.join(inner)}.{leaf}"
    return f"{half}.upsamples.{4 * int(block) + int(index)}.{_WAN_BLOCK[inner[0]]}.{leaf}"


def stability(tensors: Tensors) -> Tensors:
    """A transformer's tensors (diffusers' names) as Stability AI's files have them.

    Source: https://github.com/Stability-AI/sd3.5 (mmditx.py).
    """
    ends = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    block = {
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    fused = {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    }
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    named: Tensors = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name in ends:
            named[ends[name]] = tensor
        elif module in ends:
            named[f"{ends[module]}.{leaf}"] = _shift_first(tensor) if module == "norm_out.linear" else tensor
        else:
            _, number, inner = module.split(".", 2)
            if inner in block:
                # The last block's context has no gates: its modulation is AdaLayerNormContinuous.
                swapped = inner == "norm1_context.linear" and int(number) == last
                named[f"joint_blocks.{number}.{block[inner]}.{leaf}"] = (
                    _shift_first(tensor) if swapped else tensor
                )
            for target, parts in fused.items():
                if inner == parts[0]:
                    rows = [tensors[f"transformer_blocks.{number}.{part}.{leaf}"] for part in parts]
                    named[f"joint_blocks.{number}.{target}.{leaf}"] = torch.cat(rows)
    return named


def _shift_first(tensor: torch.Tensor) -> torch.Tensor:
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def z_image(transformer: State) -> Tensors:
    """Z-Image's transformer under the original names: fused qkv, as ComfyUI's and GGUF files have it.

    Source: diffusers' ``convert_z_image_transformer_checkpoint_to_diffusers``, whose inverse this is.
    """
    state = dict(transformer)
    for name in [name for name in state if name.endswith(".attention.to_q.weight")]:
        stem = name.removesuffix(".to_q.weight")
        state[f"{stem}.qkv.weight"] = torch.cat([state.pop(f"{stem}.to_{each}.weight") for each in "qkv"])
    return renamed(
        state,
        lambda name: (
            name.replace("all_final_layer.2-1.", "final_layer.")
            .replace("all_x_embedder.2-1.", "x_embedder.")
            .replace(".attention.to_out.0.", ".attention.out.")
            .replace(".attention.norm_k.", ".attention.k_norm.")
            .replace(".attention.norm_q.", ".attention.q_norm.")
        ),
    )
