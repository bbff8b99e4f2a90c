"""Prompts whose words have weights, read piece by piece, and what becomes of a text encoder's states.

``(word)`` counts 1.1, ``[word]`` 1/1.1, ``(word:1.3)`` as it says; brackets nest. ``BREAK`` begins a new
window where a text encoder has several. The rules are stable-diffusion.cpp's, which are AUTOMATIC1111's
but for this: of backslashes only the one in ``\\(`` goes, and an unclosed bracket counts to the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

BREAK = "BREAK"
BREAK_WEIGHT = -1.0
"""What the word weighs where it has no window to begin."""

_ROUND, _SQUARE = 1.1, 1 / 1.1

_DEEPEST = 64
"""Brackets deeper than this are text: each level multiplies all that is in it once more."""

_TOKEN = re.compile(
    r"\\\(|\\.?|\(|\[|:(?P<weight>[+-]?[.\d]+)\)|\)|\]|(?P<break>\bBREAK\b)|[^\\()\[\]:B]+|:|B", re.DOTALL
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


class Piece(NamedTuple):
    """Some text and how much it counts."""

    text: str
    weight: float

    @property
    def is_break(self) -> bool:
        return self == (BREAK, BREAK_WEIGHT)


def pieces(prompt: str) -> list[Piece]:
    """``prompt`` without its brackets, neighbours of one weight together; none where it is empty."""
    found: list[tuple[str, float]] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def multiply(start: int, factor: float) -> None:
        found[start:] = [(text, weight * factor) for text, weight in found[start:]]

    for match in _TOKEN.finditer(prompt):
        text = match[0]
        if text == "(" and len(open_round) < _DEEPEST:
            open_round.append(len(found))
        elif text == "[" and len(open_square) < _DEEPEST:
            open_square.append(len(found))
        elif match["weight"]:
            if open_round:
                multiply(open_round.pop(), _number(match["weight"]))
        elif text == ")" and open_round:
            multiply(open_round.pop(), _ROUND)
        elif text == "]" and open_square:
            multiply(open_square.pop(), _SQUARE)
        elif match["break"]:
            found.append((BREAK, BREAK_WEIGHT))
        else:
            found.append(("(" if text == r"\(" else text, 1.0))
    for starts, factor in ((open_round, _ROUND), (open_square, _SQUARE)):
        for start in starts:
            multiply(start, factor)
    return list(_merged(found))


def _merged(found: Sequence[tuple[str, float]]) -> Iterator[Piece]:
    texts: list[str] = []
    before: float | None = None
    for text, weight in found:
        if texts and (weight != before or weight == BREAK_WEIGHT):
            yield Piece("".join(texts), before or 0.0)
            texts = []
        texts.append(text)
        before = weight
    if texts:
        yield Piece("".join(texts), before or 0.0)


def _number(written: str) -> float:
    match = _NUMBER.match(written)
    return float(match[0]) if match else 1.0


def tokens(prompt: str, read: Callable[[str], list[int]]) -> tuple[list[int], list[float]]:
    """The tokens of ``prompt`` and their weights, each piece read by itself."""
    ids: list[int] = []
    weights: list[float] = []
    for piece in pieces(prompt):
        read_ids = read(piece.text)
        ids += read_ids
        weights += [piece.weight] * len(read_ids)
    return ids, weights


def reader(tokenizer: Any) -> Callable[[str], list[int]]:
    """How ``tokenizer`` reads a piece: without what it puts at the ends."""

    def read(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    return read


def scaled(states: Any, weights: Sequence[float]) -> Any:
    """``states`` (…, tokens, width), each token's times its weight, their mean as it was."""
    if all(weight == 1.0 for weight in weights):
        return states
    import torch

    factors = torch.tensor(weights, dtype=torch.float32).to(states.device)
    before = states.float()
    after = before * factors[:, None]
    means = before.mean(), after.mean()
    ratio = torch.where(means[1] == 0, torch.ones_like(means[1]), means[0] / means[1])
    return (after * ratio).to(states.dtype)
