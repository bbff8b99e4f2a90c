"""Whether a file is what its name says: the headers of safetensors and GGUF, and what error pages look like.

For files whose hash is not known, and for the words of an error where it is; and how long a header is, for
who has the beginning of a file. Reads headers only, knows neither torch nor the network.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO

_HTML = (b"<!doctype", b"<html", b"<head", b"<body")
_TEXT_NAMES = (".html", ".htm", ".md", ".txt")
"""What may well begin like a page."""
_LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 32 * 2**20
"""Of a safetensors file. Models' headers have some 100 kB, with notes of their training up to 20 MB; the
library takes 100 MB, which unpack to gigabytes."""

_GGUF_HEAD = 24
MAX_GGUF_ENTRIES = 50_000
"""Keys, and tensors, of a GGUF file: the largest have some 2,000 of each."""

MAX_GGUF_WORDS = 2_000_000
"""Of all lists among a GGUF file's keys: vocabularies have up to 500,000 words, and as many merges."""

MAX_GGUF_NAME_BYTES = 65_535
"""Of a key, as its specification says; no tensor's name is longer."""
MAX_GGUF_DIMENSIONS = 8
"""Of a GGUF file's tensor; the format says 4 at present."""

GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letters for the types of a GGUF file's metadata."""

_GGUF_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2)},
}
"""Elements and bytes of a block, by type; a type that is not here counts as at least one byte in all."""


_DAMAGE = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, RecursionError, MemoryError),
)
"""What reading a header that someone made up may end in."""


_MAGIC_BYTES = 512
"""What tells the other kinds of file apart; tar's mark stands at 257."""

_GROWTH = 4
"""Times as much as there is of a GGUF file is asked for next."""


class _Wrong(Exception):
    """The header does not hold."""


class _Short(_Wrong):
    """The header goes on where the file ends."""

    def __init__(self) -> None:
        super().__init__("it is longer than the file")


def header_bytes(start: bytes) -> int | None:
    """How much of the file that begins with ``start`` has all of its header: more than there is where more
    has to be read, a guess where it is GGUF, which does not say. ``None``: no program reads it.
    """
    if start.startswith(b"GGUF") and len(start) >= _GGUF_HEAD:
        try:
            end, _ = _gguf_header(io.BytesIO(start), math.inf)
        except _Short:
            return _GROWTH * len(start)
        except (_Wrong, *_DAMAGE):
            return None
        return end if end <= len(start) else max(end, _GROWTH * len(start))
    if start[8:9] == b"{" and (length := struct.unpack_from("<Q", start)[0]) <= MAX_HEADER_BYTES:
        return int(8 + length)
    return min(_MAGIC_BYTES, len(start))


def impostor(path: Path) -> str | None:
    """What a file that should be a model is instead, where that is plain to see."""
    if is_page(path):
        return "an HTML page"
    if _start(path).startswith(_LFS_POINTER):
        return "a git-lfs pointer, not the file it points to"
    return None


def is_page(path: Path) -> bool:
    """Whether the file is a web page."""
    text = _start(path).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith(_HTML) or (text.startswith(b"<?xml") and b"<html" in text)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def header_problem(path: Path, filename: str) -> str | None:
    """Why a file is not what ``filename`` says it is, or ``None``; of other formats only pages are known."""
    if filename.lower().endswith(_TEXT_NAMES):
        return None
    if what := impostor(path):
        return f"this is {what}"
    check = _check_of(filename)
    if check is None:
        return None
    size = path.stat().st_size
    if size < _GGUF_HEAD:
        return None  # too short for a header; nothing of it can be judged but its length
    try:
        with path.open("rb") as file:
            check(file, size)
    except (_Wrong, *_DAMAGE) as error:
        return f"its header is wrong: {error if isinstance(error, _Wrong) else 'it cannot be read'}"
    return None


def _check_of(filename: str) -> Callable[[IO[bytes], int], None] | None:
    lower = filename.lower()
    if lower.endswith(".safetensors"):
        return _check_safetensors
    return _check_gguf if lower.endswith(".gguf") else None


def _check_safetensors(file: IO[bytes], size: int) -> None:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise _Wrong("it is longer than the file")
    if length > MAX_HEADER_BYTES:
        raise _Wrong(f"it has {length} bytes; at most {MAX_HEADER_BYTES} are read")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise _Wrong("it is no table of tensors")
    end = 0
    for start, stop in sorted(
        each["data_offsets"] for name, each in header.items() if name != "__metadata__"
    ):
        if start != end:
            raise _Wrong("its tensors do not lie one behind the other")
        end = stop
    if 8 + length + end != size:
        raise _Wrong(f"it tells of {8 + length + end} bytes, the file has {size}")


def _check_gguf(file: IO[bytes], size: int) -> None:
    start, ends = _gguf_header(file, size)
    if len(ends) > 1 and start + max(ends) > size:
        raise _Wrong(f"it tells of {start + max(ends)} bytes, the file has {size}")


def _gguf_header(file: IO[bytes], size: float) -> tuple[int, list[int]]:
    """Where the tensors begin, and where each ends behind that, after a 0."""
    if file.read(4) != b"GGUF":
        raise _Wrong("it does not begin with GGUF")
    version, tensors, pairs = struct.unpack("<IQQ", file.read(_GGUF_HEAD - 4))
    if version == 1:
        raise _Wrong("it is of version 1, which no program reads any more")
    if is_big_endian(version):
        raise _Wrong("it is big-endian, for machines of the other byte order")
    if version not in {2, 3}:
        raise _Wrong(f"version {version}")
    if max(tensors, pairs) > MAX_GGUF_ENTRIES:
        raise _Wrong(f"it has {pairs} keys and {tensors} tensors; at most {MAX_GGUF_ENTRIES} are read")
    alignment = 32
    for _ in range(pairs):
        key = _string(file)
        value = _value(file, size, _number(file, "<I"))
        if key == b"general.alignment" and isinstance(value, int) and value > 0:
            alignment = value
    ends = [0]
    for _ in range(tensors):
        _string(file)
        if (dimensions := _number(file, "<I")) > MAX_GGUF_DIMENSIONS:
            raise _Wrong(f"a tensor of {dimensions} dimensions")
        shape = [_number(file, "<Q") for _ in range(dimensions)]
        kind, offset = _number(file, "<I"), _number(file, "<Q")
        elements, nbytes = _GGUF_BLOCKS.get(kind, (math.prod(shape) or 1, 1))
        ends.append(offset + math.prod(shape) // elements * nbytes)
    return -(-file.tell() // alignment) * alignment, ends


def is_big_endian(version: int) -> bool:
    """Whether a GGUF file's version is one whose bytes lie the other way round."""
    return version & 0xFFFF == 0 and version >> 24 in {1, 2, 3}


def _number(file: IO[bytes], code: str) -> int:
    width = struct.calcsize(code)
    if len(found := file.read(width)) < width:
        raise _Short
    return int(struct.unpack(code, found)[0])


def _string(file: IO[bytes]) -> bytes:
    if (length := _number(file, "<Q")) > MAX_GGUF_NAME_BYTES:
        raise _Wrong(f"a name of {length} bytes")
    return file.read(length)


def _value(file: IO[bytes], size: float, kind: int) -> int | None:
    """Read past one value; returns it where it is a plain 32-bit number."""
    if kind == GGUF_STRING:
        _skip(file, size, _number(file, "<Q"))
    elif kind == GGUF_ARRAY:
        item, count = _number(file, "<I"), _number(file, "<Q")
        if item in GGUF_SCALARS:
            _skip(file, size, count * struct.calcsize(f"<{GGUF_SCALARS[item]}"))
        elif item != GGUF_STRING or count > MAX_GGUF_WORDS:
            raise _Wrong(f"a list of {count} values of type {item}")
        else:
            for _ in range(count):
                _skip(file, size, _number(file, "<Q"))
    elif kind == 4:
        return _number(file, "<I")
    elif kind in GGUF_SCALARS:
        _skip(file, size, struct.calcsize(f"<{GGUF_SCALARS[kind]}"))
    else:
        raise _Wrong(f"a value of type {kind}")
    return None


def _skip(file: IO[bytes], size: float, count: int) -> None:
    if file.tell() + count > size:
        raise _Short
    file.seek(count, 1)
