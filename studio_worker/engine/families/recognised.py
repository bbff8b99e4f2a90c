"""Architectures that are known by their tensors and not served, so that they are refused by name.

Also what a file is where it is no whole model (a VAE, a text encoder, a ControlNet), and ways to pack weights
that are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from studio_worker.engine.files.checkpoint import Checkpoint
from studio_worker.engine.files.gguf_files import Shape
from studio_worker.engine.files.sections import Section

_ATTENTION_KEY = ".transformer_blocks.0.attn2.to_k.weight"


@dataclass(frozen=True)
class Recognised:
    """An architecture that is known and not served: every name in ``keys`` is in its checkpoints.

    Names stand without the ``model.diffusion_model.`` that whole checkpoints put before them.
    ``fits`` narrows it down by shapes where names alone do not.
    """

    name: str
    keys: tuple[str, ...]
    fits: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True  # noqa: ARG005


def recognise(checkpoint: Checkpoint) -> str:
    """The name of the family that is recognised and not served, or an empty string."""
    shapes = {name.removeprefix("model.diffusion_model."): each for name, each in checkpoint.shapes.items()}
    for candidate in RECOGNISED:
        if all(key in shapes for key in candidate.keys) and candidate.fits(shapes):
            return candidate.name
    return ""


def packing(section: Section) -> str:
    """How the weights of a section are packed where that is known and not read, or an empty string."""
    types, shapes = section.checkpoint.types, section.shapes
    for name in shapes:
        for end, words in _PACKINGS.items():
            if name.endswith(end):
                return words
    for name, shape in shapes.items():
        scale = section.scale_of(name)
        if types.get(section.prefix + name, "").startswith("F8") and scale is not None:
            is_float = types.get(section.prefix + scale) in {"F32", "F16", "BF16"}
            if not is_float or prod(shapes[scale]) not in {1, *shape[:1]}:
                return _IN_BLOCKS
    return ""


_IN_BLOCKS = "8-bit floats scaled block by block (MXFP8 and others)"

_PACKINGS = {
    ".weight_scale_2": "4-bit floats (NVFP4)",
    ".weight_scale_inv": _IN_BLOCKS,
    ".quant_state.bitsandbytes__nf4": "bitsandbytes' 4-bit floats (NF4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes' 4-bit floats (FP4)",
    ".SCB": "bitsandbytes' 8-bit integers",
    ".qweight": "packed integers (SVDQuant, GPTQ or AWQ)",
}
"""By what tells them: names of what lies beside the weights. Of ComfyUI's comfy/quant_ops.py, bitsandbytes'
functional.py (QuantState) and nn/modules.py (Linear8bitLt), nunchaku's and AutoGPTQ's layers.
"""


def _channels(count: int) -> Callable[[Mapping[str, Shape]], bool]:
    """Whether the UNet takes ``count`` channels in."""
    return lambda shapes: shapes["input_blocks.0.0.weight"][1:2] == (count,)


def _context(width: int) -> Callable[[Mapping[str, Shape]], bool]:
    """Whether the UNet's cross-attention reads text embeddings of ``width`` numbers."""

    def fits(shapes: Mapping[str, Shape]) -> bool:
        return any(key.endswith(_ATTENTION_KEY) and shape[-1:] == (width,) for key, shape in shapes.items())

    return fits


RECOGNISED: tuple[Recognised, ...] = (
    # The first that fits wins: what is narrower stands before what is wider. Most keys are those by which
    # diffusers 0.42 tells original-layout checkpoints (diffusers/loaders/single_file_utils.py,
    # CHECKPOINT_KEY_NAMES), and ComfyUI (comfy/model_detection.py); the rest are the published state dicts'
    # own.
    Recognised("Playground 2.5", ("edm_mean",)),
    Recognised("CosXL", ("edm_vpred.sigma_max",)),
    Recognised("Stable Video Diffusion", ("input_blocks.1.0.time_stack.in_layers.0.weight",)),
    Recognised("Stable Diffusion XL refiner", ("conditioner.embedders.0.model.text_projection",)),
    Recognised("Stable Diffusion XL refiner", ("input_blocks.0.0.weight",), _context(1280)),
    Recognised("a ControlNet, not a checkpoint", ("control_model.time_embed.0.weight",)),
    Recognised("InstructPix2Pix", ("input_blocks.0.0.weight",), _channels(8)),
    Recognised(
        "Stable Diffusion 3 of another kind", ("joint_blocks.0.context_block.adaLN_modulation.1.bias",)
    ),
    Recognised("Chroma of another kind (Radiance)", ("distilled_guidance_layer.in_proj.bias",)),
    Recognised("FLUX.2", ("single_stream_modulation.lin.weight",)),
    Recognised("FLUX.3", ("early_stream_modulations.image.lin.weight",)),
    Recognised("FLUX.3", ("ref_time_in.in_layer.weight",)),
    Recognised("Krea 2", ("txtfusion.projector.weight",)),
    Recognised("HunyuanVideo", ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",)),
    Recognised(
        "FLUX.1 of another kind (Depth, Canny, of another size)",
        ("double_blocks.0.img_attn.norm.key_norm.scale",),
    ),
    Recognised("Lumina Image 2", ("cap_embedder.0.weight", "layers.0.adaLN_modulation.1.weight")),
    Recognised(
        "Qwen-Image of another kind (Layered, of another size)",
        ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
    ),
    Recognised("Qwen-Image 2.1", ("txt_in.text_norm.weight",)),
    Recognised("a ControlNet for Z-Image", ("control_all_x_embedder.2-1.weight",)),
    Recognised("a ControlNet for Z-Image", ("control_layers.14.adaLN_modulation.0.weight",)),
    Recognised("AuraFlow", ("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight")),
    Recognised("HiDream", ("double_stream_blocks.0.block.adaLN_modulation.1.bias",)),
    Recognised("LTX-Video", ("patchify_proj.weight",)),
    Recognised("PixArt", ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias")),
    Recognised("PixArt", ("t_block.1.weight",)),
    Recognised("LTX-Video", ("adaln_single.emb.timestep_embedder.linear_1.bias",)),
    Recognised("Mochi", ("blocks.0.attn.qkv_x.weight",)),
    Recognised("Cosmos", ("net.x_embedder.proj.1.weight",)),
    Recognised("Hunyuan-DiT", ("mlp_t5.0.weight",)),
    Recognised("Wan", ("head.modulation", "patch_embedding.weight")),
    Recognised("Wan", ("condition_embedder.time_embedder.linear_1.weight", "patch_embedding.weight")),
    Recognised("Stable Cascade", ("clip_txt_mapper.weight",)),
    Recognised("Stable Cascade", ("down_blocks.1.0.channelwise.0.weight",)),
    Recognised("Sana", ("blocks.0.cross_attn.q_linear.weight",)),
    Recognised(
        "a motion module of AnimateDiff", ("mid_block.motion_modules.0.temporal_transformer.norm.bias",)
    ),
    Recognised(
        "a UNet alone in the diffusers layout", ("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight")
    ),
    Recognised("a VAE alone, not a checkpoint", ("decoder.conv_in.weight", "encoder.conv_in.weight")),
    Recognised("a CLIP text encoder alone", ("text_model.embeddings.token_embedding.weight",)),
    Recognised("a CLIP text encoder alone", ("embeddings.token_embedding.weight",)),
    Recognised("T5's encoder alone", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    Recognised("T5's encoder alone", ("block.0.layer.0.SelfAttention.q.weight",)),
    Recognised("T5's encoder alone", ("enc.blk.0.attn_q.weight",)),
    Recognised("a language model alone", ("model.layers.0.self_attn.q_proj.weight",)),
    Recognised("a language model alone", ("layers.0.self_attn.q_proj.weight",)),
    Recognised("a language model alone", ("blk.0.attn_q.weight", "token_embd.weight")),
    Recognised("a vision encoder alone", ("v.patch_embd.weight",)),
    Recognised("a VAE of Wan's or Qwen-Image's alone", ("decoder.conv1.weight", "encoder.conv1.weight")),
)
