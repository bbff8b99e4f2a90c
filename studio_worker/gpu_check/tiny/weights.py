"""Tensors of tiny models: drawn at random, renamed, and written with their configurations.

Every weight is drawn anew, norms and biases too, so that a name which is mixed up shows in the picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from studio_worker.engine.families.component import Tokenizer
from studio_worker.engine.families.qwen import QWEN_TOKENIZER
from studio_worker.models import FileRole, LocalFile

State = Mapping[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]


def drawn(module: torch.nn.Module, seed: int) -> Any:
    """``module`` with every weight drawn from ``seed``, rounded to half precision as published ones are.

    Activations keep their size; norms lie around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 or name.endswith(".gamma"):
            numbers = 0.2 * noise + (1.0 if name.endswith(("weight", "gamma")) else 0.0)
        else:
            numbers = 0.8 * noise * parameter[0].numel() ** -0.5
        if ".SelfAttention.q." in name:
            numbers /= 4  # T5 leaves it to these weights to keep its attention's logits small
        parameter.data = numbers.half().float()
    return module.eval().requires_grad_(False)


def state(module: torch.nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def prefixed(state: State, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(state: State, rename: Callable[[str], str]) -> Tensors:
    return {rename(name): tensor for name, tensor in state.items()}


def config(folder: Path, content: Mapping[str, Any]) -> Path:
    """``folder`` with a ``config.json`` of ``content``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content, default=str), encoding="utf-8")
    return folder


def config_of(module: Any) -> dict[str, Any]:
    """The configuration that a library's ``module`` was made with."""
    found = module.config
    return found.to_dict() if hasattr(found, "to_dict") else dict(found)


def safetensors(path: Path, role: FileRole, state: State, dtype: torch.dtype | None = None) -> LocalFile:
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
        safetensors(
            folder / f"model-{index + 1:05}-of-{count:05}.safetensors",
            role,
            {name: state[name] for name in names[index * size : (index + 1) * size]},
        )
        for index in range(count)
    ]


def byte_tokenizer(folder: Path, special: Mapping[str, int]) -> Tokenizer:
    """A Qwen2 tokenizer of single bytes, with the same chat template as the real one."""
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
