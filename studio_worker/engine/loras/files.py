"""What a LoRA file holds, read from its header alone: which of its tensors belong together, and what they do.

Trainers write the same few things under many names. This module owns the ends of those names (what comes
before is the layer's, which places.py finds in a model). It imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from studio_worker.engine.files.checkpoint import read_checkpoint, version_of
from studio_worker.engine.files.reading import reading
from studio_worker.engine.files.safetensors_files import metadata
from studio_worker.engine.loras.adapter import Adapter
from studio_worker.errors import JobImpossible, NotServed
from studio_worker.models import LocalFile

_ENDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        # kohya-ss, LyCORIS, OneTrainer, musubi-tuner; PEFT, with an adapter's name or without
        (r"\.lora_(?:down|A)(?:\.(?!weight$)[^.]+)?(?:\.weight)?$", "down"),
        (r"\.lora_(?:up|B)(?:\.(?!weight$|bias$)[^.]+)?\.bias$", "up_bias"),
        (r"\.lora_(?:up|B)(?:\.(?!weight$)[^.]+)?(?:\.weight)?$", "up"),
        (r"\.lora_mid\.weight$", "mid"),
        # diffusers until 0.17, XLabs
        (r"(?:_lora|\.lora|\.lora_linear_layer)?\.down\.weight$", "down"),
        (r"(?:_lora|\.lora|\.lora_linear_layer)?\.up\.weight$", "up"),
        (r"\.(?:lora_)?alpha$", "alpha"),
        (r"\.scalar$", "scalar"),
        (r"\.dora_scale$", "dora"),
        (r"\.lora_magnitude_vector(?:\.[^.]+)*$", "magnitude"),
        *((rf"\.hada_{name}$", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(
            (rf"\.lokr_{name}$", f"lokr_{name}")
            for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        ),
        (r"\.(?:diff|w_norm)$", "diff"),
        (r"\.(?:diff_b|b_norm)$", "diff_b"),
        (r"\.set_weight$", "set"),
        # Weights that were trained beside the factors, whole: norms, say.
        (r"\.modules_to_save(?:\.[^.]+)?\.weight$", "set"),
        (r"\.modules_to_save(?:\.[^.]+)?\.bias$", "set_b"),
        (r"\.(?:weight|scale)$", "set"),
        (r"\.bias$", "set_b"),
    )
)
"""The first that fits wins. Sources: the ``state_dict`` of LyCORIS' modules (lycoris/modules), kohya-ss'
networks/lora.py, ComfyUI's comfy/lora.py and comfy/weight_adapter, PEFT's tuners/lora/layer.py, diffusers'
loaders/lora_conversion_utils.py.
"""

_UNREAD = (
    (re.compile(r"\.(?:oft_|boft_)\w+(?:\.\w+)*$"), "OFT or BOFT"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$"), "IA3"),
    (re.compile(r"^(?:lora_controlnet$|controlnet)"), "control LoRA"),
    (re.compile(r"\.reshape_weight$"), "control LoRA"),
    (re.compile(r"^bundle_emb\."), "embedding"),
)
"""Kinds that are known and not read."""

_SETTINGS = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings of each component, as JSON (its loaders/lora_base.py)."""


@dataclass(frozen=True)
class Scaling:
    """What PEFT's settings say of a component's layers: ``alpha``, for some layers others, over the rank or
    its root.
    """

    alpha: float | None = None
    by_layer: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    def alpha_of(self, layer: str) -> float | None:
        """Of the layer of that name within its component."""
        for name, alpha in self.by_layer.items():
            if layer == name or layer.endswith(f".{name}"):
                return alpha
        return self.alpha


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file understood.

    Args:
        adapters: by the layers' names in the file.
        unread: names of tensors that are of no use here, with what they are where that is known.
    """

    file: LocalFile
    adapters: Mapping[str, Adapter]
    unread: Mapping[str, str]

    def size_bytes(self, itemsize: int) -> int:
        """What it takes beside a model once it is in it."""
        return sum(each.size_bytes(itemsize) for each in self.adapters.values())


def read_lora(file: LocalFile) -> LoraFile:
    """The header of a LoRA file.

    Raises:
        NotServed: it holds only kinds that are not read here.
        JobImpossible: it is no LoRA, or not a whole one.
        FileDamaged, JobError: as :func:`studio_worker.engine.files.checkpoint.read_checkpoint`.
    """
    return _read(file, version_of(file.path))


@lru_cache(maxsize=64)  # one that is in a model already is not read again
def _read(file: LocalFile, _version: tuple[int, int, int]) -> LoraFile:
    checkpoint = read_checkpoint(file.path)
    name = file.path.name
    if checkpoint.format != "safetensors":
        raise NotServed(f"LoRA {name} is a GGUF file; register it as safetensors")
    found: dict[str, dict[str, str]] = {}
    unread: dict[str, str] = {}
    for tensor in checkpoint.shapes:
        kind = next((words for pattern, words in _UNREAD if pattern.search(tensor)), None)
        if kind is not None:
            unread[tensor] = kind
            continue
        match, role = next(
            ((match, role) for pattern, role in _ENDS if (match := pattern.search(tensor))), (None, "set")
        )
        layer = (tensor if match is None else tensor[: match.start()]).replace(".processor.", ".")
        found.setdefault(layer, {})[role] = tensor
    settings = _settings(file)
    adapters = {}
    for layer, names in found.items():
        component, within = _within(layer, settings)
        scaling = settings.get(component, Scaling())
        shapes = {role: checkpoint.shapes[tensor] for role, tensor in names.items()}
        adapter = Adapter(layer, names, shapes, scaling.alpha_of(within), scaling.by_root)
        if names.keys() <= {"alpha", "scalar"}:
            unread |= dict.fromkeys(names.values(), "")
            continue
        if lacks := adapter.lacks:
            raise JobImpossible(f"LoRA {name} is not whole: {layer} lacks {lacks}")
        if not adapter.is_whole:
            told = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
            raise JobImpossible(f"LoRA {name} has tensors for {layer} that do not go together: {told}")
        adapters[layer] = adapter
    if not any(each.is_trained for each in adapters.values()):
        kinds = ", ".join(sorted({kind for kind in unread.values() if kind}))
        if kinds:
            raise NotServed(f"LoRA {name} is of a kind that is not read here: {kinds}; read are {READ}")
        raise JobImpossible(f"LoRA {name} is none: it has no tensor of {READ}")
    return LoraFile(file, adapters, unread)


READ = "LoRA, LoCon, LoHa, LoKr, DoRA or full differences"


def _within(layer: str, settings: Mapping[str, Scaling]) -> tuple[str, str]:
    """The component that a layer's name begins with, where there are settings of it, and the rest."""
    for component in settings:
        if component and layer.startswith(f"{component}."):
            return component, layer.removeprefix(f"{component}.")
    return "", layer


def _settings(file: LocalFile) -> dict[str, Scaling]:
    """What the header says of the strength, by component."""
    with reading(file.path):
        text = metadata(file.path).get(_SETTINGS, "")
    try:
        said = json.loads(text) if text else {}
        by_component: dict[str, dict[str, Any]] = {}
        for key, value in said.items():
            component, _, setting = key.rpartition(".")
            by_component.setdefault(component, {})[setting] = value
        return {component: _scaling(each) for component, each in by_component.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise JobImpossible(
            f"LoRA {file.path.name} has metadata ({_SETTINGS}) that cannot be read: {type(error).__name__}"
        ) from error


def _scaling(said: Mapping[str, Any]) -> Scaling:
    alpha = said.get("lora_alpha")
    # PEFT's patterns are regular expressions; what writes them writes names, and no file's expression is run.
    by_layer = {str(k).strip("^$"): float(v) for k, v in (said.get("alpha_pattern") or {}).items()}
    return Scaling(None if alpha is None else float(alpha), by_layer, bool(said.get("use_rslora")))
