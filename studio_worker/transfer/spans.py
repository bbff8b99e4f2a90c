"""Which bytes of a file are there: in memory to the byte, on disk to the block.

Decides nothing about what they are worth. The map on disk outlives a killed process; it says less than the
truth then, never more.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

BLOCK_BYTES = 64 * 1024
"""A killed process loses at most so much for each of its connections."""


class Spans:
    """A set of byte ranges ``[start, end)``, kept sorted and merged."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0
        """How many bytes they hold."""
        for span in spans:
            self.add(*span)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def add(self, start: int, end: int) -> tuple[int, int]:
        """Add ``[start, end)``; returns the merged range that it is part of now."""
        if start >= end:
            return start, end
        low = bisect.bisect_left(self._ends, start)
        high = bisect.bisect_right(self._starts, end)
        if low < high:
            start, end = min(start, self._starts[low]), max(end, self._ends[high - 1])
        self.total += end - start - sum(self._ends[low:high]) + sum(self._starts[low:high])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        return start, end

    def remove(self, start: int, end: int) -> None:
        """Take ``[start, end)`` out."""
        for first, last in self:
            if first < end and start < last:
                index = self._starts.index(first)
                del self._starts[index], self._ends[index]
                self.total -= last - first
                for rest in ((first, min(last, start)), (max(first, end), last)):
                    if rest[0] < rest[1]:
                        self.add(*rest)

    def end_from(self, at: int) -> int:
        """Where the bytes that begin at ``at`` end; ``at`` itself where there are none."""
        index = bisect.bisect_right(self._starts, at) - 1
        return max(at, self._ends[index]) if index >= 0 else at

    def start_after(self, at: int) -> int | None:
        """Where the first range that begins behind ``at`` begins."""
        index = bisect.bisect_right(self._starts, at)
        return self._starts[index] if index < len(self._starts) else None

    def gaps(self, total: int) -> Iterator[tuple[int, int]]:
        """What is missing of ``[0, total)``."""
        at = 0
        for start, end in self:
            if at < start:
                yield at, start
            at = end
        if at < total:
            yield at, total


class BlockMap:
    """One byte on disk for each block of a file that is there; made whole or not at all.

    Args:
        total: the length of the file that is mapped.
    """

    def __init__(self, path: Path, total: int) -> None:
        self._total = total
        # Written, not mapped: where a disk is full, a write is an error and a mapped page the process's end.
        self._file = path.open("r+b", buffering=0)
        self._flags = bytearray(self._file.read())
        if len(self._flags) != _blocks(total):
            self.close()
            raise ValueError("the map is that of another file")

    @classmethod
    def create(cls, path: Path, spans: Spans, total: int) -> Self:
        """A new map that knows ``spans``."""
        temporary = path.with_suffix(".map.tmp")
        temporary.write_bytes(bytes(_blocks(total)))
        new = cls(temporary, total)
        for start, end in spans:
            new.mark(start, end)
        temporary.replace(path)
        return new

    def mark(self, start: int, end: int) -> None:
        """Note the blocks that lie wholly in ``[start, end)``."""
        first = -(-start // BLOCK_BYTES)
        last = _blocks(self._total) if end >= self._total else end // BLOCK_BYTES
        if self._flags.find(0, first, last) >= 0:
            self._flags[first:last] = b"\1" * (last - first)
            os.pwrite(self._file.fileno(), self._flags[first:last], first)

    def spans(self, size: int) -> Spans:
        """What is noted, as far as a file of ``size`` bytes can hold it."""
        found = Spans()
        at = 0
        flags = self._flags
        while (first := flags.find(1, at)) >= 0:
            at = flags.find(0, first)
            at = at if at >= 0 else len(flags)
            found.add(first * BLOCK_BYTES, min(at * BLOCK_BYTES, self._total, size))
        return found

    def close(self) -> None:
        """Let go of the file; what is noted stays."""
        self._file.close()


def _blocks(total: int) -> int:
    return max(1, -(-total // BLOCK_BYTES))
