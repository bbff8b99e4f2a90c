"""Greys of more than 8 bits, and in floats, as 8 bits by the range that they are in.

Pillow clips them at 255. 16 bits say which number is white; 32 bits and floats do not, so it is the least of
the usual ones that no number exceeds. Works in place: a foreign picture is allowed so much memory.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_SAMPLE_FORMAT, _BITS = 339, 258
"""Of TIFF's tags: whether numbers are unsigned (1), signed or floats, and how many bits they have."""

_BRIGHTEST = 16.0
"""Of floats that mean 1 by white: renderers go beyond it where something shines."""


def is_deep(picture: Image.Image) -> bool:
    """Whether ``picture`` is of greys beyond 8 bits."""
    return picture.mode.startswith(("I", "F"))


def eight_bit(picture: Image.Image) -> Image.Image:
    """A deep ``picture`` as grey of 8 bits, with alpha where one of its levels stands for transparency."""
    levels = np.array(picture, dtype=np.float32)
    if picture.mode == "I" and _tag(picture, _SAMPLE_FORMAT, 1) == 1:  # Pillow knows signed numbers only
        np.add(levels, 2.0**32, out=levels, where=levels < 0)
    key = picture.info.get("transparency")
    alpha = np.where(levels == key, 0, 255).astype(np.uint8) if isinstance(key, int) else None
    levels /= _white(picture, float(levels.max(where=np.isfinite(levels), initial=0))) / 255
    np.nan_to_num(levels, copy=False)
    grey = Image.fromarray(levels.clip(0, 255, out=levels).round(out=levels).astype(np.uint8))
    if alpha is not None:
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _white(picture: Image.Image, top: float) -> float:
    """Which number is white in a picture whose largest one is ``top``."""
    if picture.mode.startswith("I;16"):
        return float(2 ** min(16, _tag(picture, _BITS, 16)) - 1)
    if top <= (_BRIGHTEST if picture.mode.startswith("F") else 1):
        return 1.0
    return next((white for white in (255.0, 65535.0) if top <= white), top)


def _tag(picture: Image.Image, tag: int, default: int) -> int:
    """A number of a TIFF's tag ``tag``."""
    found = getattr(picture, "tag_v2", {}).get(tag, default)
    return int(found[0] if isinstance(found, tuple) else found)
