"""Tiny random models in the file layouts in which the large ones are published, for the engine's tests.

What a layout is: the names and shapes that the published files have. Each writer cites where they come from.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from studio_worker.engine.families.component import Tokenizer
from studio_worker.models import FileRole, LocalFile

State = Mapping[str, torch.Tensor]


def ldm_layout() -> ModuleType:
    """The inverse of diffusers' renaming, from the sample model's training script."""
    path = Path(__file__).parents[1] / "packaging" / "sample-model" / "ldm_layout.py"
    spec = importlib.util.spec_from_file_location("ldm_layout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomised(module: torch.nn.Module, seed: int) -> Any:
    """``module`` with weights drawn anew: norms near 1, the rest so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            parameter.data = 1 + 0.1 * noise
        else:
            parameter.data = noise * (0.8 / max(1, parameter[0].numel()) ** 0.5)
    return module.eval().requires_grad_(False)


def write_config(folder: Path, model: Any) -> Path:
    """The ``config.json`` of ``model`` in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def write_safetensors(
    path: Path, state: State, role: FileRole, dtype: torch.dtype | None = None
) -> LocalFile:
    """``state`` as a safetensors file, optionally as another type."""
    save_file(
        {name: tensor.detach().to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}, path
    )
    return LocalFile(role, path, str(path))


def in_shards(folder: Path, role: FileRole, state: State, count: int) -> list[LocalFile]:
    """``state`` in ``count`` safetensors files, as Hugging Face's libraries save what is large."""
    folder.mkdir(exist_ok=True)
    names = list(state)
    size = -(-len(names) // count)
    return [
        write_safetensors(
            folder / f"model-{index + 1:05}-of-{count:05}.safetensors",
            {name: state[name] for name in names[index * size : (index + 1) * size]},
            role,
        )
        for index in range(count)
    ]


def original_vae(state: State, levels: int) -> dict[str, torch.Tensor]:
    """A VAE's tensors under CompVis latent-diffusion's names, as ``ae.safetensors`` has them.

    Source: diffusers' ``convert_ldm_vae_checkpoint``, whose inverse this is.
    """
    name_of = ldm_layout()._vae_name
    renamed = {}
    for name, tensor in state.items():
        new = name_of(name, levels)
        # The original's attention is made of 1x1 convolutions.
        is_matrix = ".attn_1." in new and tensor.ndim == 2
        renamed[new] = tensor[:, :, None, None] if is_matrix else tensor
    return renamed


def original_unet(state: State, per_block: int) -> dict[str, torch.Tensor]:
    """A UNet's tensors under CompVis latent-diffusion's names, those of Stability's SDXL included.

    Source: diffusers' ``convert_ldm_unet_checkpoint``, whose inverse this is.

    Args:
        per_block: the configuration's ``layers_per_block``.
    """
    attends = {
        block: any(name.startswith(f"up_blocks.{block}.attentions") for name in state) for block in range(9)
    }
    added = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    name_of = ldm_layout()._unet_name
    renamed = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        new = f"{added[stem]}.{kind}" if stem in added else name_of(name, per_block, attends)
        renamed[new] = tensor
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


def open_clip(state: State) -> dict[str, torch.Tensor]:
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


def byte_tokenizer(folder: Path, special: Mapping[str, int]) -> Tokenizer:
    """A Qwen2 tokenizer of single bytes, with the same chat template as the real one."""
    from studio_worker.engine.families.qwen import QWEN_TOKENIZER

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((QWEN_TOKENIZER.folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps({t: i for t, i in vocabulary.items() if i < 256}))
    (folder / "merges.txt").write_text("")
    config = json.loads((QWEN_TOKENIZER.folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(index): {**config["added_tokens_decoder"]["151643"], "content": token}
        for token, index in special.items()
    }
    config["additional_special_tokens"] = list(special)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer("Qwen2Tokenizer", folder, 256 + len(special))


def prefixed(state: State, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(state: State, rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {rename(name): tensor for name, tensor in state.items()}
