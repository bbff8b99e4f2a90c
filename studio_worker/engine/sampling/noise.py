"""Noise by a counter: the same numbers for a seed on every device, in every precision, with every library.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with Box and Muller's
transform, as torch's CUDA generator and stable-diffusion.cpp use them. Every draw has a number of its own, so
that nothing depends on what was drawn before; who draws when, denoising.py says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
"""The paper's constants."""

_BLOCK = 8192
"""How many numbers are made at once: their words fit a core's cache, which is several times as fast."""

_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_UNIT = np.float32(2**-32)
_CIRCLE = np.float32(2 * math.pi * 2**-32)


class Noise:
    """Normal numbers of a seed, draw after draw.

    Args:
        seed: 0 to 2**64 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draws = 0

    def draw(self, shape: Sequence[int]) -> np.ndarray:
        """The next draw, in single precision."""
        numbers = normal(self._seed, self._draws, math.prod(shape))
        self._draws += 1
        return numbers.reshape(tuple(shape))


def normal(seed: int, draw: int, count: int) -> np.ndarray:
    """The first ``count`` numbers of the draw with the number ``draw``."""
    numbers = np.empty(count, dtype=np.float32)
    for start in range(0, count, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, count), dtype=np.uint64)
        numbers[start : start + len(block)] = _normal(seed, draw, block)
    return numbers


def _normal(seed: int, draw: int, elements: np.ndarray) -> np.ndarray:
    first, second = _philox(draw, elements, (seed & 0xFFFFFFFF, seed >> 32))
    half = np.float32(0.5)
    with np.errstate(divide="ignore"):  # float32 rounds the very largest words up to 1, whose logarithm is 0
        radius = np.sqrt(np.float32(-2) * np.log((first.astype(np.float32) * _UNIT) + half * _UNIT))
    angle = second.astype(np.float32) * _CIRCLE + half * _CIRCLE
    numbers: np.ndarray = radius * np.sin(angle)
    return numbers


def _philox(draw: int, elements: np.ndarray, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The first two words for each of the counters (draw, 0, element, 0)."""
    c0, c1, c2, c3 = np.full_like(elements, draw), np.zeros_like(elements), elements, np.zeros_like(elements)
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (p1 >> _WORD) ^ c1 ^ np.uint64(k0), p1 & _LOW
        c2, c3 = (p0 >> _WORD) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1
