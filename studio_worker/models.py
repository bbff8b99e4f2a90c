"""What a model is made of: its files by role, the engine that reads them, and its default parameters.

The shapes are those of an offer's ``modelSource``, so that a studio's registry entry can be pasted into
``models.d``. JSON field names are camelCase; attributes are snake_case. Unknown fields are ignored, as the
protocol asks of readers.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass

FileRole = Literal["diffusion-model", "text-encoder", "text-encoder-vision", "vae", "lora", "model"]

CAMEL = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)
"""How every body and frame of the wire is read and written."""

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_CONTROL = {"Cc", "Zl", "Zp"}
"""Unicode categories of characters that break a line or steer a terminal; no file needs them in its name."""


def _plain_name(name: str) -> str:
    if name in {"", ".", ".."} or any(c in "/\\" or unicodedata.category(c) in _CONTROL for c in name):
        raise ValueError("must be a plain file name, without folders")
    if len(name.encode()) > 255:
        raise ValueError("must be at most 255 bytes long, as file systems want it")
    return name


def _sha256(value: str) -> str:
    if not _SHA256.fullmatch(value):
        raise ValueError("must be 64 hexadecimal digits")
    return value.lower()


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
    url: str
    filename: FileName
    approx_bytes: int | None = None
    sha256: Sha256 | None = None


class LocalFile(NamedTuple):
    """A verified file on disk. ``content`` identifies its bytes: sha256, or the store's key of its URL."""

    role: FileRole
    path: Path
    content: str


class CliDefaults(BaseModel):
    """The model's own parameters; 0 or ``None`` means that the model has no opinion."""

    model_config = CAMEL

    cfg_scale: float = 0.0
    steps: int = 0
    width: int = 0
    height: int = 0
    sampling_method: str | None = None
    flow_shift: float | None = None
    zero_cond_t: bool | None = None
    offload_to_cpu: bool | None = None
    context_size: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ModelSource(BaseModel):
    """Where a model comes from and which engine reads it (an offer's ``modelSource``)."""

    model_config = CAMEL

    engine: str
    files: tuple[ModelFile, ...] = ()
    cli_defaults: CliDefaults = CliDefaults()


class RequiredModel(ModelSource):
    """A model the box must hold before it is ready: one file of ``models.d``."""

    id: str = Field(min_length=1)
    kind: str = "image"
    vram_gb_estimate: float = 0.0
