"""Model families: which one a weights file belongs to, told from its tensors' names and shapes alone.

This module owns the one list of families that are served and the one list of those that are recognised and
refused by name. File names are never looked at, and nothing is guessed: what fits no family is refused with
what was looked for. To serve a further family: a folder in ``configs/``, a :class:`Family` in
:data:`FAMILIES`, its row out of :data:`RECOGNISED`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio_worker import sample_model
from studio_worker.engine.checkpoint import Checkpoint
from studio_worker.engine.parameters import EngineDefaults, Parameters
from studio_worker.engine.rendering import LoadedModel
from studio_worker.errors import JobError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

TOKEN_EMBEDDING = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
UNET_OUT = "model.diffusion_model.out.2.weight"
VAE_DECODER_IN = "first_stage_model.decoder.conv_in.weight"
_ATTENTION_KEY = ".transformer_blocks.0.attn2.to_k.weight"

_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Family:
    """One architecture: how its checkpoints are told, and how they are loaded.

    Args:
        name: what operators and ``generationMeta`` call it.
        config_dir: its configuration in the diffusers layout, carried by this package.
        fits: whether a checkpoint is of this family.
        load: checkpoint to model, on a device, its weights of a type.
        check: raises JobError for parameters that the family does not know, before anything is loaded.
        defaults: parameters where neither the task nor the model says anything.
    """

    name: str
    config_dir: Path
    fits: Callable[[Checkpoint], bool]
    load: Callable[[Checkpoint, torch.device, torch.dtype], LoadedModel]
    check: Callable[[Parameters], None]
    defaults: EngineDefaults = field(default_factory=EngineDefaults)


@dataclass(frozen=True)
class Recognised:
    """An architecture that is known and not served: every name in ``keys`` is in its checkpoints.

    Names stand without the ``model.diffusion_model.`` that whole checkpoints put before them.
    ``fits`` narrows it down by shapes where names alone do not.
    """

    name: str
    keys: tuple[str, ...]
    fits: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True  # noqa: ARG005


def identify(checkpoint: Checkpoint) -> Family:
    """The family of ``checkpoint``.

    Raises:
        JobError: recognised but not served, or unknown; not retryable.
    """
    for family in FAMILIES:
        if family.fits(checkpoint):
            if checkpoint.format != "safetensors":
                raise _refused(
                    checkpoint, f"is {family.name} as {checkpoint.format}, which is not served yet"
                )
            return family
    name = recognise(checkpoint)
    served = ", ".join(family.name for family in FAMILIES)
    if name:
        raise _refused(checkpoint, f"is {name}, which this worker does not serve; it serves {served}")
    raise _refused(checkpoint, f"is of no known model family; {_looked_for(checkpoint)}; served: {served}")


def recognise(checkpoint: Checkpoint) -> str:
    """The name of the family that is recognised and not served, or an empty string."""
    shapes = {_bare(name): shape for name, shape in checkpoint.shapes.items()}
    for candidate in RECOGNISED:
        if all(key in shapes for key in candidate.keys) and candidate.fits(shapes):
            return candidate.name
    return ""


def _bare(name: str) -> str:
    return name.removeprefix("model.diffusion_model.")


def _refused(checkpoint: Checkpoint, problem: str) -> JobError:
    return JobError(f"{checkpoint.path.name} {problem}", retryable=False)


def _looked_for(checkpoint: Checkpoint) -> str:
    """What told that a checkpoint is no Stable Diffusion one: missing tensors, else the shapes they have."""
    keys = (TOKEN_EMBEDDING, UNET_IN, VAE_DECODER_IN)
    missing = [key for key in keys if key not in checkpoint.shapes]
    if missing:
        return f"looked for {', '.join(missing)} among {len(checkpoint.shapes)} tensors"
    found = ", ".join(f"{key} {list(checkpoint.shapes[key])}" for key in keys)
    return f"its shapes are none of theirs: {found}"


# --- Stable Diffusion's single-file layout (the names of CompVis latent-diffusion) ---


def _json(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def stable_diffusion_shapes(config_dir: Path) -> dict[str, Shape]:
    """The telling tensors of a Stable Diffusion checkpoint and the shapes ``config_dir`` says they have."""
    text = _json(config_dir / "text_encoder" / "config.json")
    unet = _json(config_dir / "unet" / "config.json")
    vae = _json(config_dir / "vae" / "config.json")
    first, last = unet["block_out_channels"][0], vae["block_out_channels"][-1]
    return {
        TOKEN_EMBEDDING: (text["vocab_size"], text["hidden_size"]),
        UNET_IN: (first, unet["in_channels"], 3, 3),
        UNET_OUT: (unet["out_channels"], first, 3, 3),
        VAE_DECODER_IN: (last, vae["latent_channels"], 3, 3),
    }


def _stable_diffusion(name: str, config_dir: Path) -> Family:
    def fits(checkpoint: Checkpoint) -> bool:
        told = stable_diffusion_shapes(config_dir)
        width = _json(config_dir / "unet" / "config.json")["cross_attention_dim"]
        return all(checkpoint.shapes.get(key) == shape for key, shape in told.items()) and all(
            shape[-1] == width for key, shape in checkpoint.shapes.items() if key.endswith(_ATTENTION_KEY)
        )

    def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> LoadedModel:
        from studio_worker.engine.stable_diffusion import load_checkpoint

        return load_checkpoint(checkpoint, config_dir, device, dtype)

    def check(parameters: Parameters) -> None:
        from studio_worker.engine.samplers import sampler

        sampler(parameters.sampler)

    return Family(name, config_dir, fits, load, check)


FAMILIES: tuple[Family, ...] = (
    _stable_diffusion("sd1", _CONFIGS / "sd1"),
    _stable_diffusion("sample", Path(sample_model.CONFIG_DIR)),
)


# --- What is recognised and refused ---


def _channels(count: int) -> Callable[[Mapping[str, Shape]], bool]:
    """Whether the UNet takes ``count`` channels in."""
    return lambda shapes: shapes["input_blocks.0.0.weight"][1:2] == (count,)


def _context(width: int) -> Callable[[Mapping[str, Shape]], bool]:
    """Whether the UNet's cross-attention reads text embeddings of ``width`` numbers."""

    def fits(shapes: Mapping[str, Shape]) -> bool:
        return any(key.endswith(_ATTENTION_KEY) and shape[-1] == width for key, shape in shapes.items())

    return fits


RECOGNISED: tuple[Recognised, ...] = (
    # The first that fits wins: what is narrower stands before what is wider. Most keys are those by which
    # diffusers 0.42 tells original-layout checkpoints (diffusers/loaders/single_file_utils.py,
    # CHECKPOINT_KEY_NAMES); the rest are the published state dicts' own.
    Recognised("Stable Diffusion XL refiner", ("conditioner.embedders.0.model.text_projection",)),
    Recognised("Stable Diffusion XL", ("conditioner.embedders.1.model.text_projection",)),
    Recognised("Stable Diffusion XL", ("input_blocks.0.0.weight", "label_emb.0.0.weight"), _context(2048)),
    Recognised("Stable Diffusion XL refiner", ("input_blocks.0.0.weight",), _context(1280)),
    Recognised("Stable Diffusion 2.x", ("cond_stage_model.model.token_embedding.weight",)),
    Recognised("Stable Diffusion 2.x", ("input_blocks.0.0.weight",), _context(1024)),
    Recognised("a ControlNet, not a checkpoint", ("control_model.time_embed.0.weight",)),
    Recognised("Stable Diffusion 1.x for inpainting", ("input_blocks.0.0.weight",), _channels(9)),
    Recognised("InstructPix2Pix", ("input_blocks.0.0.weight",), _channels(8)),
    Recognised("Stable Diffusion 3", ("joint_blocks.0.context_block.adaLN_modulation.1.bias",)),
    Recognised("Chroma", ("distilled_guidance_layer.in_proj.bias",)),
    Recognised("FLUX.2", ("single_stream_modulation.lin.weight",)),
    Recognised("HunyuanVideo", ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",)),
    Recognised("FLUX.1", ("double_blocks.0.img_attn.norm.key_norm.scale",)),
    Recognised("Z-Image", ("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight")),
    Recognised("Lumina Image 2", ("cap_embedder.0.weight",)),
    Recognised("Qwen-Image", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    Recognised("AuraFlow", ("double_layers.0.attn.w1q.weight", "cond_seq_linear.weight")),
    Recognised("HiDream", ("double_stream_blocks.0.block.adaLN_modulation.1.bias",)),
    Recognised("LTX-Video", ("patchify_proj.weight",)),
    Recognised("Wan", ("head.modulation", "patch_embedding.weight")),
    Recognised("Stable Cascade", ("clip_txt_mapper.weight",)),
    Recognised("Sana", ("blocks.0.cross_attn.q_linear.weight",)),
    Recognised(
        "a UNet alone in the diffusers layout", ("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight")
    ),
    Recognised("a VAE alone, not a checkpoint", ("decoder.conv_in.weight", "encoder.conv_in.weight")),
    Recognised("a CLIP text encoder alone", ("text_model.embeddings.token_embedding.weight",)),
)
