"""Safetensors files whose metadata the library does not take: numbers, lists or nothing where it wants words.

Programs write such (a merge's recipe as JSON, an epoch as a number), and others read them: the tensors are as
good as any. The library reads every other file, and faster.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from studio_worker.formats import MAX_HEADER_BYTES

_LENGTH = struct.Struct("<Q")
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
}


class Entry(NamedTuple):
    """A tensor of the file: its type in the format's words, its shape, where its bytes begin and end."""

    type: str
    shape: tuple[int, ...]
    start: int
    end: int


class OddHeader(NamedTuple):
    """What such a file holds; of its metadata what is words and numbers, as words."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def odd_header(path: Path) -> OddHeader | None:
    """The header of the file at ``path`` where its metadata alone are odd; ``None`` where more is wrong.

    Raises:
        OSError: the disk does not give it.
    """
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        if len(start) < _LENGTH.size or (length := _LENGTH.unpack(start)[0]) > MAX_HEADER_BYTES:
            return None
        text = file.read(length)
        size = file.seek(0, 2)
    try:
        header = json.loads(text.decode("utf-8", "replace"), strict=False)
        said = header.pop("__metadata__", None)
        base = _LENGTH.size + length
        entries = {name: _entry(each, base) for name, each in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        return None
    at = base
    for entry in sorted(entries.values(), key=lambda each: (each.start, each.end)):
        if entry.start != at or (entry.end - at) * 8 != math.prod(entry.shape) * _BITS[entry.type]:
            return None
        at = entry.end
    if at != size:
        return None
    words = said if isinstance(said, dict) else {}
    plain = {name: str(each) for name, each in words.items() if isinstance(each, str | int | float)}
    return OddHeader(entries, plain)


def metadata(path: Path) -> Mapping[str, str]:
    """What the file at ``path`` says of itself, in words.

    Raises:
        SafetensorError: it is no whole file.
        OSError: the disk does not give it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError:
        if (header := odd_header(path)) is None:
            raise
        return header.metadata


def _entry(stated: Any, base: int) -> Entry:
    start, end = stated["data_offsets"]
    shape = tuple(stated["shape"])
    numbers = (*shape, start, end)
    if stated["dtype"] not in _BITS or not all(isinstance(each, int) and each >= 0 for each in numbers):
        raise ValueError("no tensor")
    return Entry(stated["dtype"], shape, base + start, base + end)


@contextlib.contextmanager
def open_safetensors(path: Path, device: str) -> Iterator[Any]:
    """The file at ``path``, whose ``get_tensor`` gives a tensor on ``device``, mapped on a CPU.

    Raises:
        SafetensorError: it is no whole file.
        OSError: the disk does not give it.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device=device))
        except SafetensorError:
            header = odd_header(path)
            if header is None:
                raise
            file = _OddFile(path, header, device)
        yield file


class _OddFile:
    """A file with odd metadata, mapped; reads like the library's."""

    def __init__(self, path: Path, header: OddHeader, device: str) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._entries = header.entries
        self._device = device

    def get_tensor(self, name: str) -> Any:
        import torch

        entry = self._entries[name]
        kind = getattr(torch, _TORCH[entry.type])
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=kind, device=self._device)
        count = math.prod(entry.shape)
        flat = torch.frombuffer(self._data, dtype=kind, count=count, offset=entry.start)
        return flat.reshape(entry.shape).to(self._device)


_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
