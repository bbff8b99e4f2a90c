"""LoRA files: which ones a job wants at what weight, and bringing them into a model and out again.

They are kept beside the model's own weights as adapters (peft), never merged into them: a job without LoRAs
computes with the very weights of the file, quantised models can have them too, and going from one LoRA to
another reads a few MB. diffusers knows the published layouts (its own, kohya's, and others) of every family
that it has LoRAs for.
"""

from __future__ import annotations

import logging
import re
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.utils import recurse_remove_peft_layers
from safetensors.torch import load_file

from studio_worker.engine.checkpoint import read_checkpoint
from studio_worker.errors import JobImpossible, NotServed
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


class Adapters:
    """The LoRAs that are in the loaded components now. They stay until a job wants others."""

    def __init__(self) -> None:
        self._loras: tuple[Lora, ...] = ()
        self._adapted: list[weakref.ref[Any]] = []

    def set(self, pipeline: Any, loras: tuple[Lora, ...]) -> bool:
        """Bring exactly ``loras`` into the components of ``pipeline``; whether that changed anything.

        Raises:
            FileDamaged: a file is not whole.
            NotServed: it is no LoRA for this family.
        """
        components = _components(pipeline)
        if loras == self._loras and _same(self._adapted, components):
            return False
        changes = bool(self._loras or loras)
        self.clear()
        if not loras:
            return changes
        self._adapted = [weakref.ref(component) for component in components]
        try:
            for index, lora in enumerate(loras):
                _load(pipeline, lora, f"lora{index}")
            names = [f"lora{index}" for index in range(len(loras))]
            pipeline.set_adapters(names, [lora.weight for lora in loras])
        except BaseException:
            self.clear()
            raise
        self._loras = loras
        return changes

    def clear(self) -> None:
        """Take every LoRA out; components are as they were loaded."""
        for reference in self._adapted:
            component = reference()
            names = list(getattr(component, "peft_config", ()))
            if names and isinstance(component, diffusers.ModelMixin):
                component.unload_lora()
            elif names and isinstance(component, transformers.PreTrainedModel):
                component.delete_adapter(names)
                recurse_remove_peft_layers(component)
        self._adapted, self._loras = [], ()


def _components(pipeline: Any) -> list[Any]:
    """All that might take adapters; which do is the pipeline's affair."""
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def _same(adapted: Sequence[weakref.ref[Any]], components: Sequence[Any]) -> bool:
    held = [reference() for reference in adapted]
    return len(held) == len(components) and all(a is b for a, b in zip(held, components, strict=True))


def _load(pipeline: Any, lora: Lora, adapter: str) -> None:
    path = lora.file.path
    if read_checkpoint(path).format != "safetensors":
        raise NotServed(f"LoRA {path.name} is a GGUF file; register it as safetensors")
    if not hasattr(pipeline, "load_lora_weights"):
        raise NotServed(f"LoRA {path.name}: this model family has no LoRAs")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is wanted
            # As it is loaded they are pages of the file, which may be cut short, and count as free memory.
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            pipeline.load_lora_weights(tensors, adapter_name=adapter)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # what renaming meets
        raise _unfit(path.name, error) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise _unfit(path.name, error) from error
    if not any(adapter in names for names in pipeline.get_list_adapters().values()):
        raise NotServed(f"LoRA {path.name} has no tensor for any component of this model family")


def _unfit(name: str, error: Exception) -> NotServed:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = next((line for line in lines if "size mismatch" in line), lines[0])
    return NotServed(f"LoRA {name} does not fit this model: {told[:200]}")
