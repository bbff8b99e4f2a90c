"""Prompts of any length for families that read them with CLIP.

CLIP's window is 77 tokens, of which the first and the last mark beginning and end. A longer prompt goes
through it in several windows, each marked and padded, and their embeddings stand one behind the other: the
way of AUTOMATIC1111's web UI, ComfyUI and stable-diffusion.cpp, which the models' users know. The pooled
embedding is the first window's, as in ComfyUI. A prompt that fits one window gives what diffusers gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_WINDOWS = 16
"""1200 tokens of Stable Diffusion's; every window adds to each step of the denoiser."""


def embeddings(
    encoders: Sequence[tuple[Any, Any]], texts: Sequence[str], *, layer: int | None = None
) -> list[tuple[Any, Any]]:
    """Each text's embeddings and pooled embedding: (1, tokens, widths together) and (1, width) or ``None``.

    All texts get as many tokens as the longest.

    Args:
        encoders: tokenizers with their text encoders, whose embeddings stand side by side.
        layer: which hidden state is taken; the encoder's output where it is ``None``.
    """
    import torch

    count = max(len(_windows(tokenizer, text)) for tokenizer, _ in encoders for text in texts)
    found = []
    for text in texts:
        states, pooled = [], None
        for tokenizer, encoder in encoders:
            windows = _windows(tokenizer, text)
            windows += [_marked(tokenizer, [])] * (count - len(windows))
            ids = torch.tensor(windows, device=encoder.device)
            output = encoder(ids, output_hidden_states=layer is not None)
            state = output[0] if layer is None else output.hidden_states[layer]
            states.append(state.reshape(1, -1, state.shape[-1]))
            if output[0].ndim == 2:  # an encoder with a projection
                pooled = output[0][:1]
        found.append((torch.cat(states, dim=-1), pooled))
    return found


def is_truncated(tokenizer: Any, text: str) -> bool:
    """Whether even :data:`MAX_WINDOWS` are too few for ``text``."""
    room: int = tokenizer.model_max_length - 2
    return len(_ids(tokenizer, text)) > MAX_WINDOWS * room


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _windows(tokenizer: Any, text: str) -> list[list[int]]:
    ids, room = _ids(tokenizer, text), tokenizer.model_max_length - 2
    starts = range(0, max(1, len(ids)), room)[:MAX_WINDOWS]
    return [_marked(tokenizer, ids[start : start + room]) for start in starts]


def _marked(tokenizer: Any, ids: list[int]) -> list[int]:
    marked = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return marked + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(marked))
