"""The holes that a mask cuts into a picture: which there are, what is shown around each, and how what was
painted is laid in.

Rules of pixels alone: no model, no torch. A hole is shown at the picture's own size as long as a window of
:data:`SIDE_PX` has room for it and its surroundings; only a larger one is made smaller. What lies farther
from white than the feather reaches is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from studio_worker.engine.images import any_white

Levels = NDArray[np.uint8]
"""A picture (height, width, 3) of 0 to 255."""
White = NDArray[np.bool_]
"""What a mask removes (height, width)."""

SIDE_PX = 512
"""What LaMa's published graph takes (protocol, section 4)."""

FEATHER_SIGMA_PX = 4.0
"""The upstream worker's. There it also lets the removed object shine through along the inside of the edge;
here it fades outwards alone, and what is white goes wholly."""

_MARGIN_PX, _MARGIN_SHARE = 32, 0.25
"""What is shown beside a hole at least, and of its longer side; the upstream worker's."""

_CELL_PX = 32
"""Whites with no empty cell of this size between them are one hole: their margins are each other's."""

_STRIP_ROWS = 64
"""So many rows of a hole are numbers with fractions at once: they take many times a picture's memory."""

_MAX_HOLES = 64
"""Each takes a run of the graph, of a second or more: a mask of specks is taken in larger pieces."""


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def part(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


class Hole(NamedTuple):
    """One hole.

    Attributes:
        white: what of the mask it is, within ``window``.
        window: what is shown of the picture, around it where the picture's edge allows.
        side: of the square that is shown, in the picture's pixels; beyond ``window`` there is no picture.
    """

    white: White
    window: Box
    side: int


def holes(mask: White) -> list[Hole]:
    """The holes of ``mask``, each by itself; none where nothing is white."""
    height, width = mask.shape
    found = []
    for own, box in _apart(mask):
        longest = max(box.right - box.left, box.bottom - box.top)
        wanted = longest + 2 * (round(longest * _MARGIN_SHARE) + _MARGIN_PX)
        side = max(SIDE_PX, min(wanted, max(width, height)))
        left, right = _around(box.left, box.right, side, width)
        top, bottom = _around(box.top, box.bottom, side, height)
        white = np.zeros((bottom - top, right - left), dtype=np.bool_)
        white[box.top - top : box.bottom - top, box.left - left : box.right - left] = own
        found.append(Hole(white, Box(left, top, right, bottom), side))
    return found


def shown(picture: Levels, mask: White, hole: Hole) -> tuple[Levels, White]:
    """What a graph is shown of ``picture`` and ``mask`` for ``hole``: squares of :data:`SIDE_PX`.

    Beyond the picture's edge it is mirrored, so that what is shown keeps its proportions and is never empty.
    All that is white there is shown as removed, other holes too.
    """
    levels, white = picture[hole.window.part], mask[hole.window.part]
    if hole.side != SIDE_PX:
        # Boxes, of which those with any white in them are white: every wider filter would lay the object's
        # colours over what is around it.
        height, width = _shown_size(hole)
        levels = np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BOX))
        white = any_white(white, (width, height))
    missing = [(0, SIDE_PX - size) for size in white.shape]
    return np.pad(levels, [*missing, (0, 0)], mode="symmetric"), np.pad(white, missing, mode="symmetric")


def lay_in(picture: Levels, painted: Levels, hole: Hole) -> None:
    """Put what was ``painted`` for ``hole`` into ``picture``, feathered around it."""
    height, width = _shown_size(hole)
    paint = painted[:height, :width]
    if hole.side != SIDE_PX:
        size = hole.white.shape[::-1]
        paint = np.asarray(Image.fromarray(paint).resize(size, Image.Resampling.LANCZOS))
    blurred = _blurred(hole.white)
    for begin in range(0, len(paint), _STRIP_ROWS):
        rows = slice(begin, begin + _STRIP_ROWS)
        window = picture[hole.window.part][rows]
        share = _feather(hole.white[rows], blurred[rows])[..., None]
        mixed = window + (paint[rows].astype(np.float32) - window) * share
        window[:] = np.where(share > 0, np.rint(mixed), window).astype(np.uint8)


def _shown_size(hole: Hole) -> tuple[int, int]:
    """How high and wide a hole's window is in the square that is shown."""
    height, width = hole.white.shape
    return max(1, height * SIDE_PX // hole.side), max(1, width * SIDE_PX // hole.side)


def _blurred(white: White) -> NDArray[np.uint8]:
    grey = Image.fromarray(white.astype(np.uint8) * 255)
    return np.asarray(grey.filter(ImageFilter.GaussianBlur(FEATHER_SIGMA_PX)))


def _feather(white: White, blurred: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How much of the paint there is at each pixel: all within the hole, ever less around it."""
    # At a straight edge the blurred mask is one half.
    return np.where(white, np.float32(1), np.minimum(1, 2 * (blurred.astype(np.float32) / 255)))


def _around(begin: int, end: int, side: int, limit: int) -> tuple[int, int]:
    """``side`` pixels around what lies from ``begin`` to ``end``, as far as there are so many."""
    first = min(max(0, (begin + end - side) // 2), max(0, limit - side))
    return first, min(limit, first + side)


def _apart(mask: White) -> Iterator[tuple[White, Box]]:
    """What is white in pieces that are apart: each with the box that it just fits in."""
    cell = _CELL_PX
    labels = _labelled(_coarse(mask, cell))
    while labels.max() > _MAX_HOLES:
        cell *= 2
        labels = _labelled(_coarse(mask, cell))
    for label in range(1, labels.max() + 1):
        is_own = labels == label
        rows, columns = _extent(is_own, 1), _extent(is_own, 0)
        part = slice(rows.start * cell, rows.stop * cell), slice(columns.start * cell, columns.stop * cell)
        white = mask[part]
        cells = is_own[rows, columns].repeat(cell, axis=0).repeat(cell, axis=1)
        own = white & cells[: white.shape[0], : white.shape[1]]
        inner = _extent(own, 1), _extent(own, 0)
        top, left = part[0].start, part[1].start
        yield (
            own[inner],
            Box(left + inner[1].start, top + inner[0].start, left + inner[1].stop, top + inner[0].stop),
        )


def _coarse(mask: White, cell: int) -> White:
    """Which cells have any white."""
    height, width = mask.shape
    padded = np.pad(mask, [(0, -height % cell), (0, -width % cell)])
    by_cell = padded.reshape(padded.shape[0] // cell, cell, padded.shape[1] // cell, cell)
    return np.asarray(by_cell.any(axis=(1, 3)))


def _labelled(cells: White) -> NDArray[Any]:
    """The cells with 1, 2, … in each group of those that touch, corners included; 0 elsewhere."""
    labels = np.zeros(cells.shape, dtype=np.int32)
    last = 0
    for start in zip(*np.nonzero(cells), strict=True):
        if labels[start]:
            continue
        last += 1
        labels[start] = last
        waiting = [start]
        while waiting:
            row, column = waiting.pop()
            near = slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2)
            rows, columns = np.nonzero(cells[near] & (labels[near] == 0))
            labels[near][rows, columns] = last
            waiting += zip(rows + near[0].start, columns + near[1].start, strict=True)
    return labels


def _extent(white: White, axis: int) -> slice:
    """From the first to the last that has any, along the other axis."""
    found = np.flatnonzero(white.any(axis=axis))
    return slice(int(found[0]), int(found[-1]) + 1)
