"""What a weights file holds, read from its header alone: tensor names, shapes and types, never the tensors.

This module owns which kinds of file are weights at all. Pickle in any wrapping is refused by name: loading
it runs code. It imports no torch.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from studio_worker.engine.files.gguf_files import (
    DAMAGE,
    SHORT,
    BeyondLimits,
    Shape,
    Stated,
    open_gguf,
    piece_count,
    shape_of,
    stated,
)
from studio_worker.engine.files.reading import reading
from studio_worker.engine.files.safetensors_files import odd_header
from studio_worker.errors import FileDamaged, NotServed
from studio_worker.formats import MAX_HEADER_BYTES

_MAGIC_BYTES = 512
"""Enough for every signature below; tar's stands at 257."""

_LENGTH = struct.Struct("<Q")
_LIBRARYS_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit. No text begins with bytes that make so small a number."""

_WANTED = "weights must be safetensors or GGUF files"


@dataclass(frozen=True)
class Checkpoint:
    """A weights file: its format, and by tensor name the shape (outermost dimension first, as in torch) and
    the type (the format's own word for it: ``F16``, ``BF16``, ``F8_E4M3``, ``Q4_K``). ``stated`` is what the
    file says of itself in numbers and short words: of a GGUF file's architecture by the name without that
    (``rope.freq_base``), all else by its whole name (``modelspec.prediction_type``).
    """

    path: Path
    format: Literal["safetensors", "gguf"]
    shapes: Mapping[str, Shape]
    types: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, Stated] = field(default_factory=dict)


def version_of(path: Path) -> tuple[int, int, int]:
    """What is another once a file has been exchanged, for who keeps what its header says.

    Raises:
        JobError: the disk does not give it.
    """
    with reading(path):
        found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_checkpoint(path: Path) -> Checkpoint:
    """The header of the weights file at ``path``.

    Raises:
        FileDamaged: it is no weights file at all, or not a whole one.
        NotServed: weights, but of a kind that is not read here: pickle, a piece of a file, a newer
            quantisation.
        JobImpossible: of a kind that nobody reads: a big-endian GGUF, or one of version 1.
        JobError: the disk does not give it.
    """
    with reading(path):
        return _read(path)


def _read(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(_MAGIC_BYTES)
    if _is_safetensors(start):
        return _safetensors(path, start)
    if kind := _pickle_kind(path, start):
        raise NotServed(f"{path.name} is {kind}; {_WANTED}")
    if kind := _foreign_kind(start):
        raise FileDamaged(path, f"{path.name} is {kind}; {_WANTED}")
    if start.startswith(b"GGUF"):
        return _gguf(path)
    if len(start) > _LENGTH.size:
        raise FileDamaged(path, f"{path.name} is neither a safetensors nor a GGUF file")
    return _safetensors(path, start)


def _is_safetensors(start: bytes) -> bool:
    """Eight bytes of length, whose first may be anything, then as much JSON."""
    if start[_LENGTH.size : _LENGTH.size + 1] != b"{":
        return False
    return bool(_LENGTH.unpack_from(start)[0] <= _LIBRARYS_HEADER_BYTES)


def _pickle_kind(path: Path, start: bytes) -> str:
    """What the file is where it holds, or may hold, pickled weights, else an empty string."""
    if start.startswith(b"\x80") and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:  # PROTO opcode
        return "a Python pickle (.pt, .ckpt, .bin), which can run code when loaded"
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if start[257:262] == b"ustar":
        return "a tar archive (an old .pt or .ckpt holds pickle), which can run code when loaded"
    return ""


def _foreign_kind(start: bytes) -> str:
    """What the file is where it is a known kind that is no weights file, else an empty string."""
    if start.startswith(b"\x89HDF\r\n"):
        return "an HDF5 (Keras) file"
    if start.startswith((b"lmgg", b"tjgg", b"fmgg")):
        return "a GGML file from before GGUF"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it points to"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights; the address may want a login"
    if text.startswith((b"{", b"[")):
        return "JSON text, not weights"
    return ""


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []  # cut short: still a zip, whatever was in it
    if any(name.endswith(".pkl") for name in names):
        return "a torch pickle archive (.pt, .ckpt, .bin), which can run code when loaded"
    return "a zip archive (a .pt or .ckpt is one and holds pickle)"


def _safetensors(path: Path, start: bytes) -> Checkpoint:
    if len(start) >= _LENGTH.size and (length := _LENGTH.unpack_from(start)[0]) > MAX_HEADER_BYTES:
        raise FileDamaged(
            path, f"{path.name} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
        )
    try:
        # The numpy framework: nothing here may import torch, and no tensor is read.
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            types = {name: each.get_dtype() for name, each in slices.items()}
            said = file.metadata() or {}
    except SafetensorError as error:
        odd = odd_header(path)
        if odd is None:
            # The library names its checks (InvalidHeaderLength, MetadataIncompleteBuffer, …), never the
            # content.
            raise FileDamaged(
                path, f"{path.name} is not a whole safetensors file ({path.stat().st_size} bytes): {error}"
            ) from error
        shapes = {name: each.shape for name, each in odd.entries.items()}
        types = {name: each.type for name, each in odd.entries.items()}
        said = odd.metadata
    short = {name: text for name, text in said.items() if len(text) <= SHORT}
    return Checkpoint(path, "safetensors", shapes, types, short)


def _gguf(path: Path) -> Checkpoint:
    try:
        file = open_gguf(path)
        shapes = {tensor.name: shape_of(file, tensor) for tensor in file.tensors}
        types = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    except DAMAGE as error:
        why = error if isinstance(error, BeyondLimits) else type(error).__name__
        raise FileDamaged(
            path,
            f"{path.name} is not a whole GGUF file ({path.stat().st_size} bytes): {why}",
        ) from error
    if (pieces := piece_count(file)) > 1:
        raise NotServed(
            f"{path.name} is one of {pieces} pieces of a GGUF file; register the single file that "
            "llama-gguf-split --merge makes of them"
        )
    return Checkpoint(path, "gguf", shapes, types, stated(file))
