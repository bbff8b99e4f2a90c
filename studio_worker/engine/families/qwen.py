"""Qwen language models as text encoders, what Qwen2.5-VL sees with, and the tokenizer that all of them share.

Names as transformers has them (``model.layers.0.self_attn.q_proj``; what stands before ``layers`` depends on
the class that was saved) and as llama.cpp's GGUF files (``blk.0.attn_q``; gguf's ``TensorNameMap`` is the
source of the table below).

Qwen3-4B's later weights (Instruct-2507) have its shapes and another rope base, five millions instead of one.
GGUF files say theirs, safetensors files cannot. All are read with the first one, as stable-diffusion.cpp
reads them: with another, the same file would make another picture here than in the rest of the fleet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, Tokenizer, read_json
from studio_worker.engine.families.parts.weighted import reader, scaled, tokens
from studio_worker.engine.files.sections import Tensors

if TYPE_CHECKING:
    import torch

QWEN_TOKENIZER = Tokenizer("Qwen2Tokenizer", CONFIGS / "qwen" / "tokenizer", 151_669)
"""151,643 byte-pair tokens and 26 of control; the models' embeddings have more rows, which nothing uses."""

_STATED = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
}
"""llama.cpp's words (gguf's ``Keys``) for what shapes do not tell."""

_LLAMA_CPP_ENDS = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_LLAMA_CPP_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def from_llama_cpp(tensors: Tensors) -> Tensors:
    """llama.cpp's names as transformers' without ``model.``; what generates text only is left out."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name in _LLAMA_CPP_ENDS:
            renamed[_LLAMA_CPP_ENDS[name]] = tensor
        elif (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)) and match[
            2
        ] in _LLAMA_CPP_BLOCK:
            renamed[f"layers.{match[1]}.{_LLAMA_CPP_BLOCK[match[2]]}.{match[3]}"] = tensor
    return renamed


_OUTERS = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
"""Of transformers' names, in its versions: a causal model's, one that sees, the same without its head, and
the bare language model's.
"""


def qwen3(kind: str, config_dir: Path) -> Part:
    """A Qwen3 language model without its head."""
    config = read_json(config_dir / "config.json")
    embedding = (config["vocab_size"], config["hidden_size"])
    last, head = config["num_hidden_layers"] - 1, (config["head_dim"],)
    return Part(
        kind=kind,
        role="text-encoder",
        cls="transformers.Qwen3Model",
        config=config_dir,
        layouts=(
            *Layout(
                "transformers",
                {"embed_tokens.weight": embedding, f"layers.{last}.self_attn.q_norm.weight": head},
            ).nested(_OUTERS),
            Layout(
                "llama.cpp",
                {"token_embd.weight": embedding, f"blk.{last}.attn_q_norm.weight": head},
                from_llama_cpp,
            ),
        ),
        stated=_STATED,
    )


def qwen25_language(kind: str, config_dir: Path) -> Part:
    """The language model of Qwen2.5-VL (GGUF files call it qwen2vl) without its head."""
    config = read_json(config_dir / "config.json")
    width, layers = config["hidden_size"], config["num_hidden_layers"]

    def tells(table: str, last: str) -> Mapping[str, tuple[int, ...]]:
        # Qwen3 has no such biases.
        return {f"{table}.weight": (config["vocab_size"], width), f"{last}.bias": (width,)}

    return Part(
        kind=kind,
        role="text-encoder",
        cls="transformers.Qwen2_5_VLTextModel",
        config=config_dir,
        layouts=(
            *Layout("transformers", tells("embed_tokens", f"layers.{layers - 1}.self_attn.q_proj")).nested(
                _OUTERS
            ),
            Layout("llama.cpp", tells("token_embd", f"blk.{layers - 1}.attn_q"), from_llama_cpp),
        ),
        stated=_STATED,
    )


def qwen25_vision(kind: str, config_dir: Path) -> Part:
    """The vision encoder of Qwen2.5-VL: within its safetensors file, or llama.cpp's ``mmproj`` GGUF."""
    config = read_json(config_dir / "config.json")
    width, depth, patch = config["hidden_size"], config["depth"], config["patch_size"]
    frames, channels, out = config["temporal_patch_size"], config["in_channels"], config["out_hidden_size"]

    gate = (config["intermediate_size"], width)
    return Part(
        kind=kind,
        role="text-encoder-vision",
        cls="transformers.Qwen2_5_VisionTransformerPretrainedModel",
        config=config_dir,
        layouts=(
            Layout(
                "transformers",
                {
                    "patch_embed.proj.weight": (width, channels, frames, patch, patch),
                    f"blocks.{depth - 1}.mlp.gate_proj.weight": gate,
                    "merger.mlp.2.bias": (out,),
                },
            ),
            Layout(
                "llama.cpp",
                {
                    "v.patch_embd.weight": (width, channels, patch, patch),
                    f"v.blk.{depth - 1}.ffn_gate.weight": gate,
                    "mm.2.bias": (out,),
                },
                _from_mmproj,
            ),
        ),
    )


_MMPROJ_ENDS = {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
_MMPROJ_BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _from_mmproj(tensors: Tensors) -> Tensors:
    """llama.cpp's names for a vision encoder as transformers', with what its converter took apart together
    again: queries, keys and values, and the two frames of a patch. Those are multiplied out, since the pieces
    may be quantised differently.
    """
    import torch

    from studio_worker.engine.files.weights import dequantised

    def joined(names: Iterable[str]) -> Iterator[torch.Tensor]:
        return (dequantised(tensors[name], torch.float32) for name in names)

    renamed: Tensors = {
        "patch_embed.proj.weight": torch.stack(
            [*joined(("v.patch_embd.weight", "v.patch_embd.weight.1"))], dim=2
        )
    }
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"v\.blk\.(\d+)\.(\w+)", module)
        if module in _MMPROJ_ENDS:
            renamed[f"{_MMPROJ_ENDS[module]}.{leaf}"] = tensor
        elif match and match[2] in _MMPROJ_BLOCK:
            renamed[f"blocks.{match[1]}.{_MMPROJ_BLOCK[match[2]]}.{leaf}"] = tensor
        elif match and match[2] == "attn_q":
            pieces = joined(f"v.blk.{match[1]}.attn_{each}.{leaf}" for each in "qkv")
            renamed[f"blocks.{match[1]}.attn.qkv.{leaf}"] = torch.cat([*pieces])
    return renamed


def framed(tokenizer: Any, before: str | list[int], text: str, after: str) -> tuple[list[int], list[float]]:
    """The tokens of ``text`` between those of a template's parts, and what each counts."""
    read = reader(tokenizer)
    start, end = read(before) if isinstance(before, str) else before, read(after)
    ids, weights = tokens(text, read)
    return [*start, *ids, *end], [*[1.0] * len(start), *weights, *[1.0] * len(end)]


def language_states(
    encoder: Any, ids: Sequence[int], weights: Sequence[float], device: Any, layer: int, **pictures: Any
) -> Any:
    """A hidden state (1, tokens, width) of a language model that reads ``ids``, by their weights."""
    import torch

    found = encoder(
        input_ids=torch.tensor([list(ids)]).to(device), output_hidden_states=True, **pictures
    ).hidden_states[layer]
    return scaled(found, weights)
