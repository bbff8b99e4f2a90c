"""The one form of a ``Range`` header that all storages know (RFC 9110, 14.1.2). Others are answered with the
whole, which HTTP allows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from studio_worker.local_studio.pictures.port import RangeRefused

_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")
"""Of numbers that sizes of files can be: Python makes no number of thousands of digits."""


@dataclass(frozen=True)
class Part:
    """Bytes from ``start`` until before ``stop``."""

    start: int
    stop: int

    def content_range(self, size_bytes: int) -> str:
        """As the header of that name says it."""
        return f"bytes {self.start}-{self.stop - 1}/{size_bytes}"


def is_one_range(asked: str) -> bool:
    """Whether it is of that form."""
    return _RANGE.fullmatch(asked) is not None


def part_of(asked: str, size_bytes: int) -> Part | None:
    """What is asked for of so many bytes; ``None`` for the whole.

    Raises:
        RangeRefused: they are fewer.
    """
    found = _RANGE.fullmatch(asked)
    if found is None:
        return None
    first, last, count = found.groups()
    if count is not None:
        start, stop = max(0, size_bytes - int(count)), size_bytes
    else:
        start, stop = int(first), min(size_bytes, int(last) + 1) if last else size_bytes
        if last and int(last) < int(first):
            return None  # no range at all
    if start >= stop:
        raise RangeRefused("the picture has no such range")
    return Part(start, stop)
