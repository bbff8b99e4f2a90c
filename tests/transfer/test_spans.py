"""Which bytes of a file are there, in memory and on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio_worker.transfer.spans import BLOCK_BYTES, BlockMap, Spans

PLACES = st.integers(0, 40)
CHANGES = st.lists(st.tuples(st.sampled_from(["add", "remove"]), PLACES, PLACES), max_size=30)


@given(CHANGES)
def test_spans_are_the_bytes_that_came(changes: list[tuple[str, int, int]]) -> None:
    """Whatever comes and goes in whatever order, each byte is known, counted once, and no other is."""
    spans, there = Spans(), set[int]()
    for what, start, end in changes:
        if what == "add":
            spans.add(start, end)
            there |= set(range(start, end))
        else:
            spans.remove(start, end)
            there -= set(range(start, end))
        assert {at for span in spans for at in range(*span)} == there
        assert spans.total == len(there)
        assert [*spans] == sorted(spans)
        assert all(end < start for (_, end), (start, _) in zip([*spans], [*spans][1:], strict=False))
        for at in range(42):
            assert spans.end_from(at) == next(each for each in range(at, 99) if each not in there)
            begins = [start for start, _ in spans if start > at]
            assert spans.start_after(at) == (min(begins) if begins else None)
        missing = {at for gap in spans.gaps(41) for at in range(*gap)}
        assert missing == set(range(41)) - there


@settings(max_examples=50)
@given(
    st.integers(1, 6 * BLOCK_BYTES),
    st.lists(st.tuples(st.integers(0, 6 * BLOCK_BYTES), st.integers(1, 3 * BLOCK_BYTES)), max_size=8),
    st.integers(0, 6 * BLOCK_BYTES),
)
def test_map_on_disk_says_no_more_than_what_is_there(
    total: int, pieces: list[tuple[int, int]], size: int
) -> None:
    """What a killed process's map says was written, and lies in the file as it is now; whole blocks are not
    lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.map"
        there, marked = Spans(), BlockMap.create(path, Spans(), total)
        for start, length in pieces:
            if start < total:
                marked.mark(*there.add(start, min(total, start + length)))
        marked.close()
        again = BlockMap(path, total)
        found = again.spans(size)
        again.close()
    for start, end in found:
        assert there.end_from(start) >= end
        assert end <= size
    for start, end in there:
        first = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        last = min(size, end if end == total else end // BLOCK_BYTES * BLOCK_BYTES)
        assert first >= last or found.end_from(first) >= last


def test_map_of_another_length_is_not_believed(tmp_path: Path) -> None:
    """A map that was made for a file of another length is refused."""
    BlockMap.create(tmp_path / "part.map", Spans(), 3 * BLOCK_BYTES).close()
    with pytest.raises(ValueError, match="another file"):
        BlockMap(tmp_path / "part.map", 3 * BLOCK_BYTES + 1)
