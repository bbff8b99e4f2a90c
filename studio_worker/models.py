"""What a model is made of: its files by role, the engine that reads them, and its default parameters.

The shapes are those of an offer's ``modelSource``, so that a studio's registry entry can be pasted into
``models.d``. JSON field names are camelCase; attributes are snake_case. Unknown fields are ignored, as the
protocol asks of readers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass

from studio_worker.plain import plain

FileRole = Literal["diffusion-model", "text-encoder", "text-encoder-vision", "vae", "lora", "model"]

CAMEL = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)
"""How every body and frame of the wire is read and written."""

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def _plain_name(name: str) -> str:
    if name in {"", ".", ".."} or plain(name) != name or "/" in name or "\\" in name:
        raise ValueError("must be a plain file name, without folders and control characters")
    if len(name.encode()) > 255:
        raise ValueError("must be at most 255 bytes long, as file systems want it")
    return name


def _sha256(value: str) -> str:
    if not _SHA256.fullmatch(value):
        raise ValueError("must be 64 hexadecimal digits")
    return value.lower()


NAME_CHARS = 200
"""Of ids, and of what models and assets are called: file names, labels and log lines are made of them."""

_URL_CHARS = 8192
"""More than servers take; the longest signed ones have some 2,000."""

_MAX_FILES = 256
_MAX_FILE_BYTES = 10**15
_MAX_NUMBER = 2**31 - 1
"""Beyond what a file, a picture or a step can be. What is possible within it is said where it is used."""

Name = Annotated[str, Field(max_length=NAME_CHARS)]
"""Kept as it came: the other side has to know it again."""
Label = Annotated[str, Field(max_length=NAME_CHARS), AfterValidator(plain)]
"""For people and logs."""
Count = Annotated[int, Field(le=_MAX_NUMBER)]
FileName = Annotated[str, AfterValidator(_plain_name)]
"""A file's name without folders, as every file system takes it."""
Sha256 = Annotated[str, AfterValidator(_sha256)]
"""64 hexadecimal digits; lower case is kept."""


@dataclass(frozen=True, config=ConfigDict(alias_generator=to_camel, populate_by_name=True))
class ModelFile:
    """One file of a model.

    ``approx_bytes`` is the size the registry knows, for space checks and progress only; what is exact is
    ``sha256`` (either case is accepted, lower case is kept).
    """

    role: FileRole
    url: Annotated[str, Field(max_length=_URL_CHARS)]
    filename: FileName
    approx_bytes: Annotated[int, Field(ge=0, le=_MAX_FILE_BYTES)] | None = None
    sha256: Sha256 | None = None


class LocalFile(NamedTuple):
    """A verified file on disk. ``content`` identifies its bytes: sha256, or the store's key of its URL."""

    role: FileRole
    path: Path
    content: str


class CliDefaults(BaseModel):
    """The model's own parameters; 0 or ``None`` means that the model has no opinion.

    ``max_vram_gib`` bounds what of the device a picture is planned with. ``mmap`` asks for weights to be
    mapped, which they always are here while they are loaded.
    """

    model_config = CAMEL

    cfg_scale: float = 0.0
    steps: Count = 0
    width: Count = 0
    height: Count = 0
    sampling_method: Label | None = None
    flow_shift: float | None = None
    zero_cond_t: bool | None = None
    offload_to_cpu: bool | None = None
    context_size: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mmap: bool | None = None
    max_vram_gib: float | None = None


class ModelSource(BaseModel):
    """Where a model comes from and which engine reads it (an offer's ``modelSource``)."""

    model_config = CAMEL

    engine: Label
    files: Annotated[tuple[ModelFile, ...], Field(max_length=_MAX_FILES)] = ()
    cli_defaults: CliDefaults = CliDefaults()


class RequiredModel(ModelSource):
    """A model the box must hold before it is ready: one file of ``models.d``."""

    id: Label = Field(min_length=1)
    kind: str = "image"
    vram_gb_estimate: float = 0.0
