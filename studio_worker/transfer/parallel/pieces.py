"""How a file is cut into pieces for several connections. Is told what is free and who fetches what."""

from __future__ import annotations

import time
from collections.abc import Iterable

from studio_worker.transfer.parallel.range_reader import RangeReader
from studio_worker.transfer.spans import Spans

_LARGEST_PIECE = 32 * 1024 * 1024
_SMALLEST_PIECE = 4 * 1024 * 1024
_SMALLEST_SHARE = 512 * 1024
"""A piece is not divided into shares smaller than this."""


def next_piece(free: Spans, connections: int) -> tuple[int, int] | None:
    """The first of what is ``free``, as large as is good for so many connections."""
    first = next(iter(free), None)
    if first is None:
        return None
    share = free.total // (2 * connections)  # the last ones are small: all end at one time
    size = min(_LARGEST_PIECE, max(_SMALLEST_PIECE, share))
    start, end = first
    # What would be left over is not worth a request of its own.
    return (start, end) if end - start < size + _SMALLEST_SHARE else (start, start + size)


def share_of_slowest(readers: Iterable[RangeReader], helper: RangeReader) -> tuple[int, int] | None:
    """Half of what the slowest connection still has to fetch, taken from it where that is worth a request."""
    now = time.monotonic()
    slowest: RangeReader | None = None
    longest_s = 0.1
    for reader in readers:
        rate = reader.rate(now)
        left_s = (reader.end - reader.at) / rate if rate else float("inf")
        if reader is not helper and reader.end - reader.at >= 2 * _SMALLEST_SHARE and left_s > longest_s:
            slowest, longest_s = reader, left_s
    if slowest is None or longest_s < 2 * max(slowest.first_byte_s, helper.first_byte_s):
        return None
    with slowest.lock:
        middle = slowest.at + (slowest.end - slowest.at) // 2
        if slowest.end - middle < _SMALLEST_SHARE:
            return None
        piece = (middle, slowest.end)
        slowest.end = middle
    return piece
