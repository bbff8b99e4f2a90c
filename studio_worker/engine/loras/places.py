"""Where a LoRA's layers are in a model: by their names in the file, in whichever layout those are.

Names are compared without their dots, since kohya-ss writes underscores in their place. Shapes must agree:
what has no place is told, what has another shape belongs to another model, and both are known before anything
is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from studio_worker.engine.families.component import Part
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.parts.layer_names import Named
from studio_worker.engine.files.gguf_files import Shape
from studio_worker.engine.loading import empty_model
from studio_worker.engine.loras.adapter import Adapter
from studio_worker.engine.loras.files import READ, read_lora
from studio_worker.engine.loras.wanted import Lora
from studio_worker.errors import JobImpossible, NotServed

_DENOISERS = re.compile(
    r"(?:model\.)?diffusion_model\.|lora_(?:unet|transformer)[_.]|transformer\.|unet\.|(?:pipe\.)?dit\."
)
"""What stands before the names of a denoiser's layers: ComfyUI and ai-toolkit, kohya-ss and musubi-tuner,
OneTrainer, diffusers, DiffSynth-Studio."""

_READERS = re.compile(
    r"lora_te(?P<kohya>\d?)[_.]|text_encoder(?:_(?P<diffusers>\d))?\.|te(?P<short>\d?)\."
    r"|(?:text_encoders\.)?(?P<comfy>clip_l|clip_g|t5xxl|t5|qwen\w*)\.(?:transformer\.|model\.)?"
)
"""Likewise for text encoders."""

_COMFY = {"clip_l": 1, "clip_g": 2, "t5xxl": 3, "t5": 3}

_BEFORE_ALL = re.compile(r"^(?:base_model\.model\.|lycoris_)")
"""What PEFT itself puts before all names, and what LyCORIS does."""

_OUTER = re.compile(r"^(?:text_model|model_language_model|language_model|model)_")
"""What some versions of transformers put around a text encoder, and others do not."""


class _Layers(NamedTuple):
    """A component's layers: the shapes of their own weights, and their names without dots."""

    shapes: Mapping[str, Mapping[str, Shape]]
    named: Mapping[str, Named]

    def find(self, name: str) -> Named | None:
        flat = _flat(name)
        return self.named.get(flat) or self.named.get(_OUTER.sub("", flat, count=1))


def _flat(name: str) -> str:
    return name.replace(".", "_")


class Place(NamedTuple):
    """Where an adapter works: the layers of a component whose rows it has one after the other.

    Attributes:
        rows: of each.
        row: the shape of one.
        rolled: whether the halves of its rows lie the other way round.
    """

    part: str
    layers: tuple[str, ...]
    rows: tuple[int, ...]
    row: Shape
    rolled: bool


@dataclass(frozen=True)
class PlacedLora:
    """A LoRA as it goes into a model: each adapter with its place, and names of what is left out."""

    lora: Lora
    adapters: tuple[tuple[Adapter, Place], ...]
    left_out: tuple[str, ...]


class LoraPlaces:
    """Finds places in the families' components, whose layers are looked at once. For one thread."""

    def __init__(self) -> None:
        self._known: dict[str, _Layers] = {}

    def place(self, lora: Lora, family: Family, brought: Collection[str]) -> PlacedLora:
        """
        Args:
            brought: the names of the parts that the source brings.

        Raises:
            NotServed: it has names that nobody here knows.
            JobImpossible: it is a LoRA of another model.
            JobError: its file is none, or damaged.
        """
        found = read_lora(lora.file)
        placed, left_out, elsewhere, misfits = [], list(found.unread), 0, []
        for adapter in found.adapters.values():
            place = self._find(adapter.layer, family)
            if place is None:
                left_out.append(adapter.layer)
                elsewhere += 1
                continue
            part, named = place
            shapes = self._layers(family.parts[part]).shapes
            rows = tuple(shapes[layer]["weight"][0] for layer in named.layers)
            misfit = _misfit(adapter, named, shapes)
            if misfit is not None:
                misfits.append(misfit)
            if part not in brought or misfit is not None:
                left_out.append(adapter.layer)
            else:
                row = shapes[named.layers[0]]["weight"][1:]
                placed.append((adapter, Place(part, named.layers, rows, row, named.rolled)))
        name = lora.file.path.name
        _refuse_misfits(name, misfits)
        if not placed or elsewhere > len(found.adapters) / 2:
            example = next(iter(left_out))
            raise NotServed(
                f"LoRA {name} is not for {family.name}: {elsewhere} of the {len(found.adapters)} layers that "
                f"it changes are unknown there, such as {example}; read are {READ} in the layouts of "
                "kohya-ss, diffusers, PEFT, ComfyUI, OneTrainer and others"
            )
        return PlacedLora(lora, tuple(placed), tuple(left_out))

    def _find(self, layer: str, family: Family) -> tuple[str, Named] | None:
        name = _BEFORE_ALL.sub("", layer, count=1)
        readers = [part for part, each in family.parts.items() if each.role == "text-encoder"]
        parts = [family.denoiser, *readers]
        if match := _DENOISERS.match(name):
            parts = [family.denoiser]
        elif match := _READERS.match(name):
            number = match["kohya"] or match["diffusers"] or match["short"] or _COMFY.get(match["comfy"], 1)
            wanted = "text_encoder" if int(number) == 1 else f"text_encoder_{number}"
            # What trainers call the third is the second here where there is no other: FLUX.1's T5.
            parts = sorted(readers, key=lambda part: part != wanted)
        within = name[match.end() :] if match else name
        for part in parts:
            if named := self._layers(family.parts[part]).find(within):
                return part, named
        return None

    def _layers(self, part: Part) -> _Layers:
        if part.identity not in self._known:
            self._known[part.identity] = _layers(part)
        return self._known[part.identity]


def _empty(part: Part) -> torch.nn.Module:
    with torch.device("meta"):  # tables of places, too, which take Stable Diffusion 3 seconds
        return empty_model(part)


def _layers(part: Part) -> _Layers:
    shapes = {
        name: {kind: tuple(weight.shape) for kind, weight in module.named_parameters(recurse=False)}
        for name, module in _empty(part).named_modules()
    }
    shapes = {name: own for name, own in shapes.items() if "weight" in own}
    ours = {name: Named((name,)) for name in shapes}
    shorter = {name.removesuffix(".0"): each for name, each in ours.items() if name.endswith(".to_out.0")}
    is_reader = part.role == "text-encoder"
    named: dict[str, Named] = {}
    for name, each in (shorter | ours | dict(part.other_names(shapes))).items():
        flat = _flat(name)
        named[_OUTER.sub("", flat, count=1) if is_reader else flat] = each
    return _Layers(shapes, named)


class _Misfit(NamedTuple):
    layer: str
    found: Shape
    wanted: Shape

    @property
    def kind(self) -> str:
        """Whether it is only that the layer sees more here, or less, than where the LoRA was trained."""
        if len(self.found) == 1 or (self.found[0], *self.found[2:]) != (self.wanted[0], *self.wanted[2:]):
            return "other"
        return "sees more" if self.found[1] < self.wanted[1] else "sees less"


def _misfit(adapter: Adapter, named: Named, shapes: Mapping[str, Mapping[str, Shape]]) -> _Misfit | None:
    own = [shapes[layer]["weight"] for layer in named.layers]
    rows, has_bias = sum(shape[0] for shape in own), "bias" in shapes[named.layers[0]]
    wanted, found = (rows, *own[0][1:]), adapter.weight_shape
    # Filters are published as matrices too.
    is_flat = found is not None and len(found) == 2 and found[0] == rows and prod(found) == prod(wanted)
    if found is not None and not is_flat and _without_ones(found) != _without_ones(wanted):
        longer = max(len(found), len(wanted))
        filled = [(*shape, *[1] * (longer - len(shape))) for shape in (found, wanted)]
        return _Misfit(adapter.layer, *filled)
    for role, shape in adapter.shapes.items():
        is_by_row = role in {"diff_b", "set_b", "up_bias", "magnitude"}
        lacks_bias = role in {"diff_b", "set_b"} and len(wanted) == 1 and not has_bias
        if (
            (is_by_row and prod(shape) != rows)
            or (role == "dora" and prod(shape) not in wanted[:2])
            or lacks_bias
        ):
            return _Misfit(adapter.layer, shape, () if lacks_bias else (rows,))
    return None


def _without_ones(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _refuse_misfits(name: str, misfits: Collection[_Misfit]) -> None:
    narrower = sum(each.kind == "sees more" for each in misfits)
    for each in misfits:
        # Of a model that sees more, one layer is another: the first, which reads the mask too, say.
        if each.kind == "other" or (each.kind == "sees more" and narrower > 1):
            raise JobImpossible(
                f"LoRA {name} does not fit this model: size mismatch, {each.layer} is {list(each.found)} in "
                f"it and {list(each.wanted)} in the model"
            )
    for each in misfits:
        if each.kind == "sees less":
            raise JobImpossible(
                f"LoRA {name} is for a model that sees more than this one, a control LoRA perhaps: its "
                f"{each.layer} reads {each.found[1]} channels, the model's {each.wanted[1]}; a job has no "
                "control picture"
            )
