"""What the layers of a library class are called elsewhere: in published checkpoints, and so in LoRA files.

A LoRA file has a few layers of a model, so that a whole checkpoint's renaming cannot read it; these tables
name single layers. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple


class Named(NamedTuple):
    """What a published name stands for.

    Attributes:
        layers: of the class, whose rows lie one after the other in the published layer.
        rolled: whether the halves of its rows lie the other way round there.
    """

    layers: tuple[str, ...]
    rolled: bool = False


_BLOCK = re.compile(r"(?<=\.)N(?=\.|$)")


def by_table(
    table: Mapping[str, tuple[str, ...]], rolled: Collection[str] = ()
) -> Callable[[Collection[str]], Mapping[str, Named]]:
    """What gives the published names of those layers that are there.

    Args:
        table: published names and the class's; ``N`` is a block's number in both.
        rolled: the published names of which halves change places; a block's number may stand in them.
    """

    def other_names(layers: Collection[str]) -> Mapping[str, Named]:
        found = {}
        for published, targets in table.items():
            for number in _numbers(targets[0], layers):
                name = _BLOCK.sub(number, published)
                places = tuple(_BLOCK.sub(number, target) for target in targets)
                if all(place in layers for place in places):
                    found[name] = Named(places, name in rolled or published in rolled)
        return found

    return other_names


def _numbers(target: str, layers: Collection[str]) -> list[str]:
    before, is_block, after = target.partition(".N")
    if not is_block:
        return [""]
    pattern = re.compile(rf"{re.escape(before)}\.(\d+){re.escape(after)}")
    return [match[1] for layer in layers if (match := pattern.fullmatch(layer))]


_COMP_VIS_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_COMP_VIS_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def comp_vis(layers: Collection[str]) -> Mapping[str, Named]:
    """CompVis' names of a UNet's layers, which count its blocks in one row.

    Source: https://github.com/CompVis/latent-diffusion (ldm/modules/diffusionmodules/openaimodel.py).
    """
    down = sum(1 for each in layers if re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1", each))
    named = ((_in_comp_vis(ours, layers, down), ours) for ours in layers)
    return {theirs: Named((ours,)) for theirs, ours in named if theirs is not None}


def _in_comp_vis(layer: str, layers: Collection[str], down: int) -> str | None:
    """CompVis' name of ``layer``, where a level has ``down`` residual blocks on its way down."""
    if layer in _COMP_VIS_ENDS:
        return _COMP_VIS_ENDS[layer]
    match = re.match(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", layer
    )
    if match is None:
        return None
    way, kind, inner = match[1], match[3], match[5]
    level, index = int(match[2] or 0), int(match[4])
    if kind == "resnets":
        inner = _COMP_VIS_RESNET[inner]
    if way == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{inner}"
    if way == "down" and kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (down + 1)}.0.op"
    if way == "down":
        return f"input_blocks.{1 + level * (down + 1) + index}.{int(kind == 'attentions')}.{inner}"
    if kind == "upsamplers":
        attends = any(each.startswith(f"up_blocks.{level}.attentions.") for each in layers)
        return f"output_blocks.{level * (down + 1) + down}.{1 + attends}.conv"
    return f"output_blocks.{level * (down + 1) + index}.{int(kind == 'attentions')}.{inner}"
