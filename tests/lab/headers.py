"""Headers of model files, odd ones too, and files of full size of which nothing but the header is there."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import gguf
import torch

from studio_worker.engine.families import FAMILIES
from studio_worker.engine.loading import empty_model
from studio_worker.models import LocalFile


def with_metadata(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Any, padding: int = 0
) -> LocalFile:
    """A safetensors file whose metadata may be anything that JSON has; bytes are passed on as they are."""
    header: dict[str, Any] = {}
    content = b""
    for name, tensor in tensors.items():
        own = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = {
            torch.float32: "F32",
            torch.float16: "F16",
            torch.bfloat16: "BF16",
            torch.float8_e4m3fn: "F8_E4M3",
        }
        offsets = [len(content), len(content) + len(own)]
        header[name] = {"dtype": kind[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        content += own
    said = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    whole = b'{"__metadata__":' + said + b"," + json.dumps(header).encode()[1:] + b" " * padding
    path.write_bytes(struct.pack("<Q", len(whole)) + whole + content)
    return LocalFile("vae", path, str(path))


IQ2_XXS = 16
"""ggml's number of a quantisation that diffusers does not compute with."""


class Hollow(bytes):
    """The content of a file whose header is there and whose weights are none: zeros, made when they are asked
    for, 1 MiB at a time at most. It is as long as a model, and takes no more than its header.
    """

    size: int

    @property
    def header(self) -> bytes:
        return super().__getitem__(slice(None))

    @classmethod
    def of(cls, header: bytes, size: int) -> Hollow:
        hollow = cls(header)
        hollow.size = size
        return hollow

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: Any) -> bytes:  # type: ignore[override]
        start, stop, _ = where.indices(self.size)
        stop = min(stop, start + max(2**20, super().__len__()))
        return super().__getitem__(where)[: stop - start].ljust(stop - start, b"\0")


def hollow_safetensors(shapes: Mapping[str, tuple[int, ...]], kind: str = "BF16", spaces: int = 0) -> Hollow:
    """A model of these tensors, of two bytes a number unless ``kind`` has one."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + prod(shape) * (1 if kind.startswith("F8") else 2)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode() + b" " * spaces
    return Hollow.of(struct.pack("<Q", len(text)) + text, 8 + len(text) + at)


def hollow_gguf(shapes: Mapping[str, tuple[int, ...]], kind: int, words: int = 0) -> Hollow:
    """A model whose matrices are of ggml's type ``kind``, all else plain, with a vocabulary of ``words``."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    facts = text("tokens") + struct.pack("<IIQ", 9, 8, words) + text("a word") * words
    header, at = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 1) + facts, 0
    block, size = {int(each): sizes for each, sizes in gguf.GGML_QUANT_SIZES.items()}.get(kind, (32, 16))
    for name, shape in shapes.items():
        is_packed = len(shape) == 2 and shape[-1] % block == 0
        its = kind if is_packed else 0
        numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], its, at)
        header += text(name) + numbers
        at += -(-(prod(shape) // block * size if is_packed else prod(shape) * 4) // 32) * 32
    header += b"\0" * (-len(header) % 32)
    return Hollow.of(header, len(header) + at)


@lru_cache
def parts_of(family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of a model in full size, by file: its role, and a number where it has several."""
    (found,) = (each for each in FAMILIES if each.name == family)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in found.parts.values():
        number = sum(name.startswith(part.role) for name in parts)
        state = empty_model(part).state_dict()
        parts[f"{part.role}{f'.{number}' if number else ''}"] = {
            name: tuple(each.shape) for name, each in state.items()
        }
    return parts


def whole(family: str) -> dict[str, Hollow]:
    """All files of a model in full size, as safetensors."""
    return {name: hollow_safetensors(shapes) for name, shapes in parts_of(family).items()}
