"""Which LoRAs a job wants, at what weight. What their files hold is files.py's to say."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

from studio_worker.errors import JobImpossible
from studio_worker.models import LocalFile

_TAG = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>")
"""stable-diffusion.cpp's and AUTOMATIC1111's way to name a LoRA and its weight in a prompt."""

_LOG = logging.getLogger(__name__)

MAX_WEIGHT = 10.0
"""Pictures fall apart long before."""


class Lora(NamedTuple):
    """A LoRA and how strongly it works; 1 is what it was trained for, less than 0 its opposite."""

    file: LocalFile
    weight: float

    @property
    def name(self) -> str:
        """What a prompt calls it: the file's name without its ending."""
        return self.file.path.stem


class Asked(NamedTuple):
    """A prompt without its tags, the LoRAs that it wants, and the names of those that nobody brings."""

    prompt: str
    loras: tuple[Lora, ...]
    unknown: tuple[str, ...] = ()


def asked_loras(prompt: str, files: Sequence[LocalFile]) -> Asked:
    """The prompt without ``<lora:NAME:WEIGHT>``, and every LoRA of ``files`` at the weight it gives, else 1.

    A tag that names another is left out with a warning, as in stable-diffusion.cpp. What stands around a tag
    stays as it is, blanks too: they are tokens to some text encoders.

    Raises:
        JobImpossible: the prompt gives a LoRA an impossible weight.
    """
    weights = {file.path.stem: 1.0 for file in files if file.role == "lora"}
    unknown: dict[str, None] = {}
    for name, written in _TAG.findall(prompt):
        if name in weights:
            weights[name] = _weight(name, written)
        else:
            unknown[name] = None
    if unknown:
        _LOG.warning("prompt names LoRAs that the source does not bring", extra={"count": len(unknown)})
    loras = [Lora(file, weights[file.path.stem]) for file in files if file.role == "lora"]
    return Asked(_TAG.sub("", prompt), tuple(lora for lora in loras if lora.weight), tuple(unknown))


def _weight(name: str, written: str) -> float:
    try:
        weight = float(written or 1)
    except ValueError:
        weight = float("nan")
    if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
        raise JobImpossible(f"LoRA {name!r} has weight {written!r}; it is a number from -10 to 10")
    return weight
