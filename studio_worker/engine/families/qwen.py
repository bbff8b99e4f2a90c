"""Qwen language models as text encoders, and the tokenizer that all of them share.

Names as transformers has them (``model.layers.0.self_attn.q_proj``) and as llama.cpp's GGUF files
(``blk.0.attn_q``; gguf's ``TensorNameMap`` is the source of the table below).

A GGUF file's own rope base is not looked at: like ComfyUI and stable-diffusion.cpp this takes Qwen3-4B's,
with which Z-Image was trained, for the later Instruct-2507 weights too.
"""

from __future__ import annotations

import re
from pathlib import Path

from studio_worker.engine.families.family import CONFIGS, Layout, Part, Tensors, Tokenizer, read_json

QWEN_TOKENIZER = Tokenizer("Qwen2Tokenizer", CONFIGS / "qwen" / "tokenizer", 151_669)
"""151,643 byte-pair tokens and 26 of control; the models' embeddings have more rows, which nothing uses."""

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


def _bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


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
            Layout(
                "transformers",
                {
                    "model.embed_tokens.weight": embedding,
                    f"model.layers.{last}.self_attn.q_norm.weight": head,
                },
                _bare,
            ),
            Layout(
                "llama.cpp",
                {"token_embd.weight": embedding, f"blk.{last}.attn_q_norm.weight": head},
                from_llama_cpp,
            ),
        ),
    )
