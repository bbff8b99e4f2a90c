"""Tiny random models in the published file layouts, for tests that compare with the library's own pipelines.

Every weight is drawn anew, norms and biases too, so that a name which is mixed up shows in the picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.family import Family
from studio_worker.engine.loading import load_part
from studio_worker.engine.parameters import resolve
from studio_worker.engine.placement import Mode, Plan
from studio_worker.engine.rendering import LoadedModel, Starting
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import CliDefaults, FileRole, LocalFile
from tests.engine_lab import decoded, request
from tests.published import Shapes

Tensors = dict[str, torch.Tensor]

PROMPT = "a red potion on grass"
WIDTH, HEIGHT, STEPS, GUIDANCE, SEED = 64, 48, 3, 3.0, 7
DEFAULTS = CliDefaults(width=WIDTH, height=HEIGHT, steps=STEPS, cfg_scale=GUIDANCE, sampling_method="euler")

VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""As FLUX.1's, but for the sizes: eight times smaller latents, no quantisation convolutions."""

CLIP = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}

T5 = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 16,
    "num_heads": 2,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
    "use_cache": False,
}


def make(engine: DiffusionEngine, files: Sequence[LocalFile], **task: Any) -> Picture:
    """What the engine makes of ``files`` and :data:`DEFAULTS`, but for what ``task`` says."""
    asked = {"files": tuple(files), "defaults": DEFAULTS, "prompt": PROMPT, "seed": SEED} | task
    return engine.generate(request(**asked), lambda _done, _total: None, Cancel())


def offloaded(
    family: Family,
    files: Sequence[LocalFile],
    mode: Mode,
    starting: Starting = Starting(),  # noqa: B008
) -> Image.Image:
    """The same picture, its components coming to the device as ``mode`` says."""
    blueprint = identify(files, [family])
    cpu = torch.device("cpu")
    parts = {
        name: load_part(family.parts[name], blueprint.sections[name], cpu, torch.float32)
        if name in blueprint.sections
        else None
        for name in family.parts
    }
    task = request(prompt=PROMPT, seed=SEED).task
    parameters = resolve(task, DEFAULTS, family.defaults, from_image=starting.picture is not None)
    model = LoadedModel(family, parts, Plan(mode, tiled=False, peak_bytes=0), cpu)
    return model.render(parameters, starting, lambda _done, _total: None, Cancel()).picture


def stock(pipeline: Any, **arguments: Any) -> Image.Image:
    """What the library's own ``pipeline`` makes of the same."""
    pipeline.set_progress_bar_config(disable=True)
    asked = {
        "prompt": PROMPT,
        "width": WIDTH,
        "height": HEIGHT,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(SEED),
    }
    picture: Image.Image = pipeline(**asked | arguments).images[0]
    return picture


def pixels(picture: Picture | Image.Image) -> np.ndarray:
    image = decoded(picture.data) if isinstance(picture, Picture) else picture
    return np.asarray(image.convert("RGB"), dtype=int)


def same(one: Picture | Image.Image, other: Picture | Image.Image) -> bool:
    """Whether two pictures are alike pixel for pixel, and show anything at all."""
    return bool((pixels(one) == pixels(other)).all()) and float(pixels(one).std()) > 5


def difference(one: Picture | Image.Image, other: Picture | Image.Image) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(pixels(one) - pixels(other)).mean())


def right_half() -> Image.Image:
    """A mask that is white on the right."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (WIDTH // 2, 0, WIDTH, HEIGHT))
    return mask


def config(folder: Path, content: Mapping[str, Any]) -> Path:
    """``folder`` with a ``config.json`` of ``content``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def drawn(module: torch.nn.Module, seed: int) -> Any:
    """``module`` with every weight drawn from ``seed``, rounded to half precision as published ones are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        if ".SelfAttention.q." in name:
            scale /= 4  # T5 leaves it to these weights to keep its attention's logits small
        centre = parameter.data.float() if parameter.ndim == 1 else 0.0
        parameter.data = (centre + noise * scale).half().float()
    return module.eval().requires_grad_(False)


def state(module: torch.nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def safetensors(path: Path, role: FileRole, tensors: Tensors) -> LocalFile:
    """``tensors`` as a safetensors file, which keeps them number for number."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return LocalFile(role, path, path.name)


def black_forest(tensors: Tensors) -> Tensors:
    """A FLUX.1 or Chroma transformer's tensors (diffusers' names) as the published files have them.

    Source: https://github.com/black-forest-labs/flux (src/flux/model.py, src/flux/modules/layers.py).
    """
    from studio_worker.engine.families.black_forest import PUBLISHED, SHIFT_BEFORE_SCALE

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


def compvis_vae(tensors: Tensors, levels: int) -> Tensors:
    """An AutoencoderKL's tensors (diffusers' names) as ``ae.safetensors`` has them.

    Source: https://github.com/black-forest-labs/flux (src/flux/modules/autoencoder.py).
    """
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = (
            name.replace("mid_block.resnets.0", "mid.block_1")
            .replace("mid_block.resnets.1", "mid.block_2")
            .replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
            .replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
            .replace("conv_norm_out", "norm_out")
            .replace("conv_shortcut", "nin_shortcut")
        )
        for each in "qkv":
            new = new.replace(f"mid_block.attentions.0.to_{each}", f"mid.attn_1.{each}")
        for level in range(levels):
            new = new.replace(f"encoder.down_blocks.{level}.resnets", f"encoder.down.{level}.block")
            new = new.replace(
                f"encoder.down_blocks.{level}.downsamplers.0", f"encoder.down.{level}.downsample"
            )
            up = levels - 1 - level  # counted from the picture
            new = new.replace(f"decoder.up_blocks.{level}.resnets", f"decoder.up.{up}.block")
            new = new.replace(f"decoder.up_blocks.{level}.upsamplers.0", f"decoder.up.{up}.upsample")
        if "attn_1" in new and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # convolutions of one pixel
        renamed[new] = tensor
    return renamed


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


def one_column(shapes: Shapes) -> Tensors:
    """A tensor for each name, of as many rows and one column, every number another."""
    tensors: Tensors = {}
    first = 0
    for name, (rows, *columns) in shapes.items():
        tensors[name] = torch.arange(first, first + rows).reshape(rows, *(1 for _ in columns))
        first += rows
    return tensors
