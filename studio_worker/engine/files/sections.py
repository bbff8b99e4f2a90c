"""The sections of a source's files: runs of tensors below one prefix, each of them one component's weights.

A file of a single component is one section without a prefix. A whole checkpoint holds several, below the
prefixes that its layout puts before each component: CompVis' (``model.diffusion_model.``,
``first_stage_model.``, ``cond_stage_model.``), Stability's generative-models' (``conditioner.embedders.N.``),
stable-diffusion.cpp's (``cond_stage_model.1.``), ComfyUI's (``text_encoders.NAME.``, ``vae.``) and those of
diffusers' folders (``unet.``, ``text_encoder_2.``). A text encoder that sees holds its vision encoder below
``visual.``. This module owns those prefixes. It imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import gguf

from studio_worker.engine.files.checkpoint import Checkpoint, read_checkpoint, version_of
from studio_worker.engine.files.gguf_files import PLAIN_TYPES, Shape
from studio_worker.models import FileRole, LocalFile

Tensors = dict[str, Any]
"""Tensors by name; quantised ones are diffusers' ``GGUFParameter``, or ``EightBitMatrix``."""

_PREFIX = re.compile(
    r"(?:model\.)?diffusion_model\."
    r"|unet\.|transformer\.(?!resblocks\.)"  # open_clip's own layers are transformer.resblocks
    r"|first_stage_model\.|vae\."
    r"|(?:cond_stage_model\.(?:\d+\.)?|conditioner\.embedders\.\d+\.(?:open_clip\.)?|text_encoders\.\w+\.)"
    r"(?:transformer|model)\.(?:(?:model\.)?visual\.)?"
    r"|text_encoder(?:_\d)?\.(?:(?:model\.)?visual\.)?"
    r"|(?:model\.)?visual\."
)

_TABLE = re.compile(r"(token_embd|embed_tokens|shared|token_embedding|position_embedding)\.weight$")
"""Embeddings, in the names of llama.cpp, transformers and open_clip."""

_HEAD = re.compile(r"(?:^|\.)lm_head\.weight$")
"""What language models guess the next word with, in transformers' name; no text encoder loads it. llama.cpp's
name for it is ``output.weight``, beside its table.
"""


@dataclass(frozen=True)
class Section:
    """The tensors of ``file`` whose names begin with ``prefix``; ``shapes`` has them without it.

    A component that is published in several files, ``shards``, is one section of them all.
    """

    file: LocalFile
    checkpoint: Checkpoint
    prefix: str
    shapes: Mapping[str, Shape]
    shards: tuple[Section, ...] = ()

    @property
    def files(self) -> tuple[LocalFile, ...]:
        return tuple(shard.file for shard in self.shards) or (self.file,)

    @property
    def role(self) -> FileRole:
        return self.file.role

    @property
    def content(self) -> str:
        """What identifies these very weights: the file's contents and the place in it."""
        return "+".join(f"{file.content}#{self.prefix}" for file in self.files)

    def size_bytes(self, itemsize: int, *, unpacked: bool = False) -> int:
        """Bytes of the weights once loaded: quantised matrices as they are unless ``unpacked``, the rest
        ``itemsize`` each.
        """
        if unpacked:
            return sum(prod(self.shapes[name]) * itemsize for name in self.loaded)
        return sum(self._loaded_bytes(name, itemsize) for name in self.loaded)

    def largest_bytes(self, count: int, itemsize: int) -> int:
        """Bytes of the ``count`` largest tensors, likewise."""
        return sum(sorted(self._loaded_bytes(name, itemsize) for name in self.loaded)[-count:])

    def packed(self) -> Iterator[tuple[int, str]]:
        """The number of weights and the type of each matrix that stays quantised, or in 8-bit floats."""
        for name in self.loaded:
            if self.stays_eight_bit(name) or self._stays_in_blocks(name):
                yield prod(self.shapes[name]), self.checkpoint.types[self.prefix + name]

    @property
    def loaded(self) -> Iterator[str]:
        """The names of what is read when it is loaded."""
        has_table = "token_embd.weight" in self.shapes
        for name in self.shapes:
            if not (_HEAD.search(name) or (has_table and name == "output.weight")):
                yield name

    def _loaded_bytes(self, name: str, itemsize: int) -> int:
        elements = prod(self.shapes[name])
        if self.stays_eight_bit(name):
            return elements
        if self._stays_in_blocks(name):
            block, block_bytes = _block(self.checkpoint.types[self.prefix + name])
            return elements // block * block_bytes
        return elements * itemsize

    def _stays_in_blocks(self, name: str) -> bool:
        shape, type_ = self.shapes[name], self.checkpoint.types.get(self.prefix + name, "")
        # Tables that are looked up in, and filters, do not compute with blocks: loading writes them out. So
        # it does with blocks that go over the ends of rows.
        is_matrix = len(shape) == 2 and not _TABLE.search(name)
        is_quantised = self.checkpoint.format == "gguf" and type_ not in PLAIN_TYPES
        return is_matrix and is_quantised and shape[-1] % _block(type_)[0] == 0

    def scale_of(self, name: str) -> str | None:
        """The name of the scale that 8-bit files have beside the weight ``name``, in either of ComfyUI's
        namings (``comfy/ops.py``, ``comfy/quant_ops.py``); ``None`` where there is none.
        """
        stem = name.removesuffix(".weight")
        return next((each for each in (f"{stem}.scale_weight", f"{name}_scale") if each in self.shapes), None)

    def stays_eight_bit(self, name: str) -> bool:
        """Whether ``name`` is a matrix of 8-bit floats that has a single scale at most."""
        is_matrix = len(self.shapes[name]) == 2 and not _TABLE.search(name)
        scale = self.scale_of(name)
        return (
            is_matrix
            and self.checkpoint.types.get(self.prefix + name, "").startswith("F8")
            and (scale is None or prod(self.shapes[scale]) == 1)
        )

    def __str__(self) -> str:
        return f"{', '.join(file.path.name for file in self.files)} ({self.role})"


def _block(type_: str) -> tuple[int, int]:
    """How many weights a block of GGUF's type ``type_`` has, and how many bytes."""
    weights, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
    return int(weights), int(size_bytes)


def joined(shards: Sequence[Section]) -> Section:
    """The section of one component whose tensors lie in several safetensors files."""
    first = shards[0]
    checkpoint = Checkpoint(
        first.checkpoint.path,
        "safetensors",
        {name: shape for shard in shards for name, shape in shard.checkpoint.shapes.items()},
        {name: type_ for shard in shards for name, type_ in shard.checkpoint.types.items()},
        {name: said for shard in shards for name, said in shard.checkpoint.stated.items()},
    )
    shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    return Section(first.file, checkpoint, first.prefix, shapes, tuple(shards))


def read_sections(files: Iterable[LocalFile]) -> tuple[Section, ...]:
    """The sections of all ``files`` but LoRAs, in the files' order.

    Raises:
        JobError: a file is no weights file, or damaged.
    """
    return tuple(
        section for file in files if file.role != "lora" for section in _sections(file, version_of(file.path))
    )


@lru_cache(maxsize=64)  # every job asks again
def _sections(file: LocalFile, _version: tuple[int, int, int]) -> tuple[Section, ...]:
    return tuple(split(file, read_checkpoint(file.path)))


def split(file: LocalFile, checkpoint: Checkpoint) -> Iterator[Section]:
    """The sections of one file, in the order in which it names them."""
    by_prefix: dict[str, dict[str, Shape]] = {}
    for name, shape in checkpoint.shapes.items():
        match = _PREFIX.match(name)
        prefix = match[0] if match else ""
        by_prefix.setdefault(prefix, {})[name.removeprefix(prefix)] = shape
    for prefix, shapes in by_prefix.items():
        yield Section(file, checkpoint, prefix, shapes)
