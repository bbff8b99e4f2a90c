"""GGUF files: the library's reader without what slows it down, and ComfyUI-GGUF's notes on shapes.

A language model's file lists some 300,000 words of its vocabulary. The library makes several numpy arrays of
every one, which takes seconds; nothing here wants them, so they are passed over. It imports no torch.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal

import gguf

from studio_worker.formats import MAX_GGUF_ENTRIES, MAX_GGUF_NAME_BYTES, MAX_GGUF_WORDS

Shape = tuple[int, ...]
"""A tensor's, outermost dimension first as in torch."""

Stated = int | float | bool | str

PLAIN_TYPES = {"F32", "F16", "F64", "I8", "I16", "I32", "I64"}
"""Types that torch reads as they are; all others, BF16 too, are blocks of bytes to it."""

_SHAPE_KEY = "comfy.gguf.orig_shape."
"""ComfyUI-GGUF's ``tools/convert.py`` lays matrices out in rows of 256 where their own rows are not multiples
of it, and notes here what they were (outermost dimension first).
"""

SHORT = 64
"""Arrays of numbers up to this long are kept: shapes are, vocabularies are not. Likewise bytes of texts."""

_NUMBER = struct.Struct("<Q")
_ARRAY = struct.Struct("<IQ")
_HEAD = struct.Struct("<4sIQQ")


class BeyondLimits(ValueError):
    """The header is larger than any model's."""


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """gguf's reader, without long arrays and texts among the metadata, and within limits."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        is_header = not hasattr(self, "data_offset")
        if is_header and count > MAX_GGUF_NAME_BYTES:
            raise BeyondLimits("a name or a shape is too long")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type == gguf.GGUFValueType.STRING:
            (length,) = _NUMBER.unpack_from(self.data, orig_offs)
            if length > MAX_GGUF_NAME_BYTES:
                return _NUMBER.size + length, [], [], [gguf.GGUFValueType.ARRAY]
        if raw_type != gguf.GGUFValueType.ARRAY:
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        item, count = _ARRAY.unpack_from(self.data, orig_offs)
        start = end = orig_offs + _ARRAY.size
        if item == gguf.GGUFValueType.ARRAY:
            raise BeyondLimits(
                "it has a list of lists"
            )  # which no model has, and no depth is deep enough for
        if item == gguf.GGUFValueType.STRING:
            if count > MAX_GGUF_WORDS:
                raise BeyondLimits(f"it has a list of {count} words")
            for _ in range(count):
                end += _NUMBER.size + _NUMBER.unpack_from(self.data, end)[0]
        elif count <= SHORT:
            parts = super()._get_field_parts(orig_offs, raw_type)
            return parts
        else:
            end += count * self.gguf_scalar_to_np[gguf.GGUFValueType(item)]().itemsize
        if end > len(self.data):
            raise ValueError("an array is longer than the file")
        return _ARRAY.size + end - start, [], [], [gguf.GGUFValueType.ARRAY]


def open_gguf(path: Path, mode: Literal["r", "c"] = "r") -> Reader:
    """A reader of the mapped file.

    Args:
        mode: ``c`` for memory that could be written to (copies of pages), as torch wants it.

    Raises:
        DAMAGE: the file is damaged, or its header larger than any model's. The library looks at nothing
            before it uses it.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) == _HEAD.size and max(_HEAD.unpack(head)[2:]) > MAX_GGUF_ENTRIES:
        raise BeyondLimits(f"it has more than {MAX_GGUF_ENTRIES} keys or tensors")
    return Reader(path, mode)


DAMAGE = (
    *(ValueError, KeyError, IndexError, OverflowError, TypeError, AttributeError, OSError, struct.error),
    *(RecursionError, MemoryError),
)
"""What :func:`open_gguf` meets in a damaged file (UnicodeDecodeError is a ValueError)."""


def stated(reader: Reader) -> dict[str, Stated]:
    """What the file's metadata say in numbers and short words, without the architecture before each name.

    That is ``rope.freq_base`` for ``qwen3.rope.freq_base``: the same thing is called the same in all of them.
    """
    architecture = reader.fields.get("general.architecture")
    prefix = f"{architecture.contents()}." if architecture else ""
    found: dict[str, Stated] = {}
    for name, field in reader.fields.items():
        if not prefix or not name.startswith(prefix) or len(field.types) != 1:
            continue
        if field.types[0] != gguf.GGUFValueType.STRING or len(field.parts[-1]) <= SHORT:
            found[name.removeprefix(prefix)] = field.contents()
    return found


def piece_count(reader: Reader) -> int:
    """Of how many pieces the file is one (llama.cpp's ``llama-gguf-split``); 1 where it is whole."""
    field = reader.fields.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    return 1 if field is None else int(field.contents())


def shape_of(reader: Reader, tensor: Any) -> Shape:
    """The tensor's shape, outermost dimension first, as it was before it was laid out for the file."""
    noted = reader.fields.get(_SHAPE_KEY + tensor.name)
    if noted is not None:
        return tuple(int(noted.parts[index][0]) for index in noted.data)
    return tuple(int(size) for size in reversed(tensor.shape))
