"""T5's encoder as a text encoder, and its tokenizer.

Names as transformers has them (``t5xxl_fp16.safetensors`` too) and as llama.cpp's GGUF files, of the
architecture t5encoder or t5 (gguf's ``TensorNameMap`` is the source of the table below).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from studio_worker.engine.families.component import CONFIGS, Layout, Part, Tokenizer, read_json
from studio_worker.engine.families.parts.weighted import reader, scaled, tokens
from studio_worker.engine.files.sections import Tensors

T5_TOKENIZER = Tokenizer("T5Tokenizer", CONFIGS / "t5" / "tokenizer", 32_100)
"""32,000 pieces and 100 sentinels; the model's embedding has more rows, which nothing uses."""

_STATED = {
    "attention.layer_norm_rms_epsilon": ("layer_norm_epsilon",),
    "attention.head_count": ("num_heads",),
    "attention.relative_buckets_count": ("relative_attention_num_buckets",),
}
"""llama.cpp's words (gguf's ``Keys``) for what shapes do not tell."""

_LLAMA_CPP_ENDS = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
_LLAMA_CPP_BLOCK = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}


def t5(kind: str, config_dir: Path) -> Part:
    """T5's encoder."""
    config = read_json(config_dir / "config.json")
    embedding, layers = (config["vocab_size"], config["d_model"]), config["num_layers"]
    attention = (config["num_heads"] * config["d_kv"], config["d_model"])
    last = f"block.{layers - 1}.layer.0.SelfAttention.q.weight"
    return Part(
        kind=kind,
        role="text-encoder",
        cls="transformers.T5EncoderModel",
        config=config_dir,
        layouts=(
            Layout("transformers", {"shared.weight": embedding, f"encoder.{last}": attention}, _whole),
            *Layout("transformers", {"embed_tokens.weight": embedding, last: attention}, _encoder).nested(
                ("encoder.", "")
            ),
            Layout(
                "llama.cpp",
                {"token_embd.weight": embedding, f"enc.blk.{layers - 1}.attn_q.weight": attention},
                _from_llama_cpp,
            ),
        ),
        stated=_STATED,
    )


def _encoder(tensors: Tensors) -> Tensors:
    """From the names of the encoder's own class, which lack what the whole model puts before them."""
    return _whole({f"encoder.{name}": tensor for name, tensor in tensors.items()})


def _whole(tensors: Tensors) -> Tensors:
    """The embedding under both of its names; files have it under either or both."""
    shared = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    both = {**tensors, "shared.weight": shared, "encoder.embed_tokens.weight": shared}
    return {name: _uncast(each) if name.endswith(_UNCAST) else each for name, each in both.items()}


def _from_llama_cpp(tensors: Tensors) -> Tensors:
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", name)
        if name in _LLAMA_CPP_ENDS:
            renamed[_LLAMA_CPP_ENDS[name]] = tensor
        elif match and match[2] in _LLAMA_CPP_BLOCK:
            place = f"encoder.block.{match[1]}.{_LLAMA_CPP_BLOCK[match[2]]}.weight"
            renamed[place] = tensor
    return _whole(renamed)


_UNCAST = ".DenseReluDense.wo.weight"


def _uncast(tensor: Any) -> Any:
    """The bytes of a quantised matrix as signed ones.

    Before this one transformers casts the numbers to the matrix's type (T5DenseGatedActDense.forward), bytes
    or not, and leaves them alone for int8 only. What multiplies it out looks at the bits.
    """
    import torch

    return tensor.view(torch.int8) if hasattr(tensor, "quant_type") else tensor


def t5_states(
    tokenizer: Any, encoder: Any, text: str, window: int, device: Any, *, masked: bool = False
) -> Any:
    """The states of ``text`` for a window of so many tokens, and how many of them it fills: its end is one.

    Args:
        masked: whether the encoder leaves the padding out.
    """
    import torch

    ids, weights = tokens(text, reader(tokenizer))
    ids = [*ids[: window - 1], tokenizer.eos_token_id]
    padding = window - len(ids)
    filled = ids + [tokenizer.pad_token_id] * padding
    mask = torch.tensor([[1] * len(ids) + [0] * padding]).to(device) if masked else None
    states = encoder(torch.tensor([filled]).to(device), attention_mask=mask)[0]
    counts = [*weights[: window - 1], *[1.0] * (padding + 1)]
    return scaled(states, counts), len(ids)


def is_t5_truncated(tokenizer: Any, text: str, window: int) -> bool:
    """Whether ``text`` with its end has more tokens than ``window``."""
    return len(tokens(text, reader(tokenizer))[0]) + 1 > window
