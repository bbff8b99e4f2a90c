"""Black Forest Labs' names for FLUX.1's tensors, and Chroma's that follow them, as diffusers'.

As in https://github.com/black-forest-labs/flux (src/flux/model.py, src/flux/modules/layers.py) and, for
``distilled_guidance_layer``, https://github.com/lodestone-rock/flow (models/chroma). diffusers 0.42's own
converter splits the fused tensors at a width of 3072 whatever the file's is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from studio_worker.engine.families.parts.layer_names import by_table
from studio_worker.engine.files.sections import Tensors

_ATTENTION = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "double_blocks.N.img_mod.lin": ("transformer_blocks.N.norm1.linear",),
    "double_blocks.N.txt_mod.lin": ("transformer_blocks.N.norm1_context.linear",),
    "double_blocks.N.img_attn.norm.query_norm": ("transformer_blocks.N.attn.norm_q",),
    "double_blocks.N.img_attn.norm.key_norm": ("transformer_blocks.N.attn.norm_k",),
    "double_blocks.N.txt_attn.norm.query_norm": ("transformer_blocks.N.attn.norm_added_q",),
    "double_blocks.N.txt_attn.norm.key_norm": ("transformer_blocks.N.attn.norm_added_k",),
    "double_blocks.N.img_attn.qkv": tuple(f"transformer_blocks.N.attn.{each}" for each in _ATTENTION),
    "double_blocks.N.txt_attn.qkv": tuple(f"transformer_blocks.N.attn.{each}" for each in _ADDED),
    "double_blocks.N.img_attn.proj": ("transformer_blocks.N.attn.to_out.0",),
    "double_blocks.N.txt_attn.proj": ("transformer_blocks.N.attn.to_add_out",),
    "double_blocks.N.img_mlp.0": ("transformer_blocks.N.ff.net.0.proj",),
    "double_blocks.N.img_mlp.2": ("transformer_blocks.N.ff.net.2",),
    "double_blocks.N.txt_mlp.0": ("transformer_blocks.N.ff_context.net.0.proj",),
    "double_blocks.N.txt_mlp.2": ("transformer_blocks.N.ff_context.net.2",),
    "single_blocks.N.modulation.lin": ("single_transformer_blocks.N.norm.linear",),
    "single_blocks.N.norm.query_norm": ("single_transformer_blocks.N.attn.norm_q",),
    "single_blocks.N.norm.key_norm": ("single_transformer_blocks.N.attn.norm_k",),
    "single_blocks.N.linear1": (
        *(f"single_transformer_blocks.N.attn.{each}" for each in _ATTENTION),
        "single_transformer_blocks.N.proj_mlp",
    ),
    "single_blocks.N.linear2": ("single_transformer_blocks.N.proj_out",),
    "distilled_guidance_layer.layers.N.in_layer": ("distilled_guidance_layer.layers.N.linear_1",),
    "distilled_guidance_layer.layers.N.out_layer": ("distilled_guidance_layer.layers.N.linear_2",),
}
"""Published modules and diffusers'; where those are several, the rows lie one after the other: each as many
as the model is wide, the MLP's the rest.
"""

SHIFT_BEFORE_SCALE = "final_layer.adaLN_modulation.1"
"""Its halves lie the other way round in diffusers."""

_X_LABS: Mapping[str, tuple[str, ...]] = {
    **{
        f"double_blocks.N.{layer}_lora{number}": PUBLISHED[f"double_blocks.N.{stream}_attn.{layer}"]
        for number, stream in ((1, "img"), (2, "txt"))
        for layer in ("qkv", "proj")
    },
    "single_blocks.N.qkv": PUBLISHED["single_blocks.N.linear1"][:3],
    "single_blocks.N.proj": PUBLISHED["single_blocks.N.linear2"],
}
"""What XLabs' attention processors are trained on, by what is left of their names without ``processor`` and
``_lora`` (https://github.com/XLabs-AI/x-flux, src/flux/modules/layers.py).
"""

black_forest_names = by_table({**PUBLISHED, **_X_LABS}, rolled={SHIFT_BEFORE_SCALE})
"""Of the layers of FLUX.1 and Chroma in LoRA files."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.[a-z])")
"""A block's number; not an index within a sequence of layers, which ends a name."""


def from_black_forest(tensors: Tensors) -> Tensors:
    """The tensors of a FLUX.1 or Chroma denoiser under diffusers' names; quantised ones stay so."""
    width = tensors["img_in.bias"].shape[0]
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        block = _NUMBER.search(module)
        targets = PUBLISHED.get(_NUMBER.sub("N", module, count=1), (module,))
        rows = tensor.roll(tensor.shape[0] // 2, 0) if module == SHIFT_BEFORE_SCALE else tensor
        for index, target in enumerate(targets):
            place = target.replace("N", block[0], 1) if block else target
            # norms call their one tensor "scale"
            renamed[f"{place}.{'weight' if leaf == 'scale' else leaf}"] = (
                rows
                if len(targets) == 1
                else rows[index * width : None if index == 3 else (index + 1) * width]
            )
    return renamed
