"""GGUF files: what their header says, and their tensors, mapped; ComfyUI-GGUF's notes on shapes.

By the format's description (ggml's ``docs/gguf.md``), versions 2 and 3. The gguf library's own reader makes
arrays of each of the 300,000 words of a language model's vocabulary, which takes seconds, and gives up over
metadata that nobody needs; here they are passed over. Its tables are used. What no program reads is refused
by name. It imports no torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np

from studio_worker.errors import JobImpossible, NotServed
from studio_worker.formats import (
    GGUF_ARRAY,
    GGUF_SCALARS,
    GGUF_STRING,
    MAX_GGUF_DIMENSIONS,
    MAX_GGUF_ENTRIES,
    MAX_GGUF_NAME_BYTES,
    MAX_GGUF_WORDS,
    is_big_endian,
)

Shape = tuple[int, ...]
"""A tensor's, outermost dimension first as in torch."""

Stated = int | float | bool | str

PLAIN_TYPES = {"F32", "F16", "F64", "I8", "I16", "I32", "I64"}
"""Types that torch reads as they are; all others, BF16 too, are blocks of bytes to it."""

SHORT = 64
"""Texts and arrays of numbers up to this long are kept: words and shapes are, vocabularies are not."""


class BeyondLimits(ValueError):
    """The header is larger than any model's."""


DAMAGE = (ValueError, KeyError, IndexError, OverflowError, TypeError, struct.error)
"""What a damaged file leads to. Memory that runs out, or a disk that fails, says nothing of a file."""

_SHAPE_KEY = "comfy.gguf.orig_shape."
"""ComfyUI-GGUF's ``tools/convert.py`` lays matrices out in rows of 256 where their own rows are not multiples
of it, and notes here what they were (outermost dimension first).
"""

_MAGIC = b"GGUF"
_LENGTH = struct.Struct("<Q")

_ALIGNMENT = 32
"""The format's, where a file says none that could be one."""

_KINDS = {int(kind) for kind in gguf.GGML_QUANT_SIZES}

_MAX_DEPTH = 4
"""Of lists within lists among the metadata; no model is known that has any."""

_NEWER = 10_000
"""Numbers of versions and types below this are newer than this worker; damage makes larger ones."""


class Tensor(NamedTuple):
    """A tensor as the file has it: ``data`` are numbers of a plain type, else the bytes of its blocks."""

    name: str
    tensor_type: Any
    shape: Shape
    data: Any


class GgufFile(NamedTuple):
    """What a file holds; ``facts`` are its metadata, numbers and short texts, and arrays of few numbers."""

    tensors: tuple[Tensor, ...]
    facts: Mapping[str, Stated | tuple[Stated, ...]]


def open_gguf(path: Path, mode: Literal["r", "c"] = "r") -> GgufFile:
    """The mapped file.

    Args:
        mode: ``c`` for memory that could be written to (copies of pages), as torch wants it.

    Raises:
        JobImpossible, NotServed: it is of a version, or has numbers of a kind, that nobody or not this worker
            reads.
        DAMAGE: the file is damaged, or its header larger than any model's.
        OSError: the disk does not give it, or there is no room to map it.
    """
    cursor = _Cursor(np.memmap(path, mode=mode), path.name)
    count, pairs = cursor.counts()
    facts: dict[str, Stated | tuple[Stated, ...]] = {}
    for _ in range(pairs):
        name = cursor.name()
        value = cursor.value(cursor.number("I"))
        if value is not None:
            facts.setdefault(name, value)
    found = [cursor.tensor() for _ in range(count)]
    if len({name for name, *_ in found}) < count:
        raise ValueError("two tensors of one name")
    alignment = _alignment(facts)
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(tuple(_mapped(cursor.data, start, *each) for each in found), facts)


class _Cursor:
    """A place in the header, which reading moves on."""

    def __init__(self, data: Any, name: str) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0
        self._bytes = memoryview(data)
        self._name = name
        self._words = 0

    def counts(self) -> tuple[int, int]:
        """How many tensors and pairs of metadata follow."""
        if bytes(self._bytes[:4]) != _MAGIC:
            raise ValueError("no GGUF file")
        self.at = 4
        version = self.number("I")
        if version == 1:
            raise JobImpossible(f"{self._name} is a GGUF file of version 1, which no program reads any more")
        if is_big_endian(version):
            raise JobImpossible(
                f"{self._name} is a big-endian GGUF file, for machines of the other byte order; register the "
                "usual, little-endian one"
            )
        if version not in {2, 3}:
            self._refuse_newer(version, "is a GGUF file of a version", "version")
        tensors, pairs = self.number("Q"), self.number("Q")
        if max(tensors, pairs) > MAX_GGUF_ENTRIES:
            raise BeyondLimits(f"it has more than {MAX_GGUF_ENTRIES} keys or tensors")
        return tensors, pairs

    def number(self, letter: str) -> Any:
        (found,) = struct.unpack_from(f"<{letter}", self._bytes, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return found

    def name(self) -> str:
        """The next name of a key or a tensor."""
        name = self.text(MAX_GGUF_NAME_BYTES)
        if name is None:
            raise BeyondLimits("a name is too long")
        return name

    def text(self, longest: int = SHORT) -> str | None:
        """The next text, whatever bytes it is of; ``None`` where it is longer than ``longest``."""
        length, start = self.number("Q"), self.at
        self._skip(length)
        return str(self._bytes[start : self.at], "utf-8", "replace") if length <= longest else None

    def value(self, kind: int, depth: int = 0) -> Stated | tuple[Stated, ...] | None:
        """The next value; ``None`` for what is not kept."""
        if kind in GGUF_SCALARS:
            number: Stated = self.number(GGUF_SCALARS[kind])
            return number
        if kind == GGUF_STRING:
            return self.text()
        if kind != GGUF_ARRAY:
            self._refuse_newer(kind, "has metadata of a type", "GGUF's number")
        return self._array(self.number("I"), self.number("Q"), depth)

    def _array(self, kind: int, count: int, depth: int) -> tuple[Stated, ...] | None:
        if letter := GGUF_SCALARS.get(kind):
            if count <= SHORT:
                return tuple(self.number(letter) for _ in range(count))
            self._skip(count * struct.calcsize(f"<{letter}"))
            return None
        self._words += count
        if self._words > MAX_GGUF_WORDS or depth > _MAX_DEPTH:
            raise BeyondLimits("it has lists of too many words, or too many within each other")
        if kind == GGUF_STRING:
            at = self.at
            for _ in range(count):
                at += _LENGTH.size + _LENGTH.unpack_from(self._bytes, at)[0]
            self._skip(at - self.at)
        else:
            for _ in range(count):
                self.value(kind, depth + 1)
        return None

    def tensor(self) -> tuple[str, Any, Shape, int]:
        """Name, type, shape and place of the next tensor."""
        name = self.name()
        dimensions = self.number("I")
        if dimensions > MAX_GGUF_DIMENSIONS:
            raise BeyondLimits(f"a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind = self.number("I")
        if kind not in _KINDS:
            self._refuse_newer(
                kind, "has weights of a quantisation", "ggml's number", ", such as Q4_K, Q6_K or Q8_0"
            )
        return name, gguf.GGMLQuantizationType(kind), shape, self.number("Q")

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > self.size:
            raise ValueError("it is longer than the file")

    def _refuse_newer(self, number: int, what: str, whose: str, others: str = "") -> None:
        if number >= _NEWER:
            raise ValueError(what)
        raise NotServed(
            f"{self._name} {what} that this worker does not know ({whose} {number}); register another "
            f"one{others}"
        )


def _alignment(facts: Mapping[str, Any]) -> int:
    stated = facts.get("general.alignment")
    if isinstance(stated, int) and stated > 0 and stated & (stated - 1) == 0:
        return stated
    return _ALIGNMENT


def _mapped(data: Any, start: int, name: str, kind: Any, shape: Shape, offset: int) -> Tensor:
    elements, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    begin = start + offset
    end = begin + math.prod(shape) // elements * size_bytes
    if end > len(data):
        raise ValueError("it is longer than the file")
    content = data[begin:end]
    if kind.name in PLAIN_TYPES:
        letter = {"F": "f", "I": "i"}[kind.name[0]]
        return Tensor(name, kind, shape, content.view(f"<{letter}{size_bytes}").reshape(shape))
    is_rows = bool(shape) and shape[-1] % elements == 0
    rows = (*shape[:-1], shape[-1] // elements * size_bytes) if is_rows else (-1,)
    return Tensor(name, kind, shape, content.reshape(rows))


def stated(file: GgufFile) -> dict[str, Stated]:
    """What the metadata say in numbers and short words, without the architecture before each name.

    That is ``rope.freq_base`` for ``qwen3.rope.freq_base``: the same thing is called the same in all of them.
    ModelSpec's keep their whole names.
    """
    prefix = f"{file.facts.get('general.architecture', '')}."
    return {
        name.removeprefix(prefix): value
        for name, value in file.facts.items()
        if name.startswith((prefix, "modelspec.")) and not isinstance(value, tuple)
    }


def piece_count(file: GgufFile) -> int:
    """Of how many pieces the file is one (llama.cpp's ``llama-gguf-split``); 1 where it is whole."""
    count = file.facts.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    return count if isinstance(count, int) else 1


def shape_of(file: GgufFile, tensor: Tensor) -> Shape:
    """The tensor's shape, outermost dimension first, as it was before it was laid out for the file."""
    noted = file.facts.get(_SHAPE_KEY + tensor.name)
    shape = tuple(size for size in noted if isinstance(size, int)) if isinstance(noted, tuple) else ()
    return shape if shape and math.prod(shape) == math.prod(tensor.shape) else tensor.shape
