"""Prompts of any length for families that read them with CLIP.

CLIP's window is 77 tokens, of which the first and the last mark beginning and end. A longer prompt goes
through it in several windows, each marked and padded, and their embeddings stand one behind the other: the
way of AUTOMATIC1111's web UI, ComfyUI and stable-diffusion.cpp, which the models' users know. ``BREAK``
begins a new window. The pooled embedding is the first window's, as in ComfyUI. A prompt that fits one window
gives what diffusers gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studio_worker.engine.families.parts.weighted import pieces, reader, scaled

MAX_WINDOWS = 16
"""1200 tokens of Stable Diffusion's; every window adds to each step of the denoiser."""

_Window = tuple[list[int], list[float]]
"""Marked and padded tokens, and what each counts."""


def embeddings(
    encoders: Sequence[tuple[Any, Any]],
    texts: Sequence[str],
    device: Any,
    *,
    layer: int | None = None,
    max_windows: int = MAX_WINDOWS,
) -> list[tuple[Any, Any]]:
    """Each text's embeddings and pooled embedding: (1, tokens, widths together) and (1, width).

    All texts get as many tokens as the longest.

    Args:
        encoders: tokenizers with their text encoders, whose embeddings stand side by side.
        device: where they compute.
        layer: which hidden state is taken; the encoder's output where it is ``None``.
        max_windows: how many windows are read of a text.
    """
    import torch

    count = max(len(_windows(tokenizer, text, max_windows)) for tokenizer, _ in encoders for text in texts)

    def read(tokenizer: Any, encoder: Any, text: str) -> tuple[Any, Any, list[float]]:
        windows = _windows(tokenizer, text, max_windows)
        windows += [_marked(tokenizer, [])] * (count - len(windows))
        output = encoder(
            torch.tensor([ids for ids, _ in windows]).to(device), output_hidden_states=layer is not None
        )
        state = output[0] if layer is None else output.hidden_states[layer]
        # An encoder with a projection gives that first.
        pooled = (output[0] if output[0].ndim == 2 else output.pooler_output)[:1]
        return state, pooled, [weight for _, each in windows for weight in each]

    # One encoder after the other, since each may have to come to the device.
    by_encoder = [[read(*encoder, text) for text in texts] for encoder in encoders]
    found = []
    for parts in zip(*by_encoder, strict=True):
        joined = torch.cat([state for state, _, _ in parts], dim=-1)
        _, pooled, weights = parts[-1]
        window = joined.shape[1]
        scaled_states = [
            scaled(state, weights[index * window : (index + 1) * window])
            for index, state in enumerate(joined)
        ]
        found.append((torch.cat(scaled_states)[None], pooled))
    return found


def is_truncated(tokenizer: Any, text: str, max_windows: int = MAX_WINDOWS) -> bool:
    """Whether even ``max_windows`` are too few for ``text``."""
    return len(_chunks(tokenizer, text)) > max_windows


def _windows(tokenizer: Any, text: str, max_windows: int) -> list[_Window]:
    return [_marked(tokenizer, chunk) for chunk in _chunks(tokenizer, text)[:max_windows]]


def _chunks(tokenizer: Any, text: str) -> list[list[tuple[int, float]]]:
    """The tokens of ``text`` with their weights, as many together as a window holds; one at least."""
    room, read = tokenizer.model_max_length - 2, reader(tokenizer)
    sections: list[list[tuple[int, float]]] = [[]]
    for piece in pieces(text):
        if piece.is_break:
            sections.append([])
        else:
            sections[-1] += [(token, piece.weight) for token in read(piece.text)]
    chunks = [section[start : start + room] for section in sections for start in range(0, len(section), room)]
    return chunks or [[]]


def _marked(tokenizer: Any, chunk: Sequence[tuple[int, float]]) -> _Window:
    ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
    weights = [1.0, *(weight for _, weight in chunk), 1.0]
    missing = tokenizer.model_max_length - len(ids)
    return ids + [tokenizer.pad_token_id] * missing, weights + [1.0] * missing
