"""LoRAs in loaded components: brought in for the jobs that want them, and out again without a trace.

What a LoRA adds to a linear layer or a convolution stands beside it as a module of its own, so that it moves
with the component, and is weighed with it; packed matrices stay packed. Of other layers (norms, tables) the
weights are exchanged, and theirs put back. No weight that came from the model's file is ever written to.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from studio_worker.engine.files.packed import PackedLinear
from studio_worker.engine.files.reading import reading
from studio_worker.engine.files.safetensors_files import open_safetensors
from studio_worker.engine.loras.branches import Branch
from studio_worker.engine.loras.changes import Change, changes
from studio_worker.engine.loras.places import PlacedLora
from studio_worker.engine.loras.wanted import Lora
from studio_worker.errors import FileDamaged, JobImpossible

_LOG = logging.getLogger(__name__)

_NAME = "loras"
"""Of the module beside a layer."""

Parts = Mapping[str, nn.Module | None]
Read = dict[Lora, list[dict[str, torch.Tensor]]]
"""What files hold: the tensors of each adapter."""


class Adapters:
    """The LoRAs that are in the loaded components now. They stay until a job wants others."""

    def __init__(self) -> None:
        self._loras: tuple[Lora, ...] = ()
        self._adapted: list[weakref.ref[nn.Module]] = []
        self._beside: list[tuple[weakref.ref[nn.Module], Any]] = []
        """Layers with branches, and what takes their hook away."""
        self._exchanged: dict[tuple[nn.Module, str], nn.Parameter] = {}
        """Weights of the model's own that others are in the place of, by layer and kind."""

    def read(self, placed: Sequence[PlacedLora]) -> Read:
        """The tensors of ``placed``, before a model is loaded for them; none where they are in one now.

        Raises:
            FileDamaged: a file is not whole.
            JobError: the disk does not give it.
            JobImpossible: it has numbers that are none.
        """
        if tuple(each.lora for each in placed) == self._loras:
            return {}
        return {each.lora: _read(each) for each in placed}

    def set(self, parts: Parts, placed: Sequence[PlacedLora], read: Read) -> bool:
        """Bring exactly ``placed`` into the components ``parts``; whether that changed anything.

        Args:
            read: what :meth:`read` gave; it is emptied.

        Raises:
            JobError: as :meth:`read`.
        """
        components = [part for part in parts.values() if part is not None]
        loras = tuple(each.lora for each in placed)
        if loras == self._loras and (not loras or _same(self._adapted, components)):
            return False
        had = bool(self._loras)
        self.clear()
        if not loras:
            return had
        self._adapted = [weakref.ref(component) for component in components]
        try:
            for lora in placed:
                self._bring(parts, lora, read.pop(lora.lora) if lora.lora in read else _read(lora))
        except BaseException:
            self.clear()
            raise
        self._loras = loras
        return True

    def clear(self) -> None:
        """Take every LoRA out; components are as they were loaded."""
        for reference, handle in self._beside:
            handle.remove()
            layer = reference()
            if layer is not None and hasattr(layer, _NAME):
                delattr(layer, _NAME)
        for (layer, kind), own in self._exchanged.items():
            own.data = own.data.to(getattr(layer, kind).device)
            setattr(layer, kind, own)
        self._adapted, self._beside, self._exchanged, self._loras = [], [], {}, ()

    def _bring(self, parts: Parts, lora: PlacedLora, read: Sequence[dict[str, torch.Tensor]]) -> None:
        for (adapter, place), tensors in zip(lora.adapters, read, strict=True):
            component = parts[place.part]
            assert component is not None
            layers = [component.get_submodule(name) for name in place.layers]
            device = next(layers[0].parameters(recurse=False)).device
            there = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}

            def plain(kind: str, layers: Sequence[nn.Module] = layers) -> torch.Tensor:
                return torch.cat([self._plain(layer, kind) for layer in layers])

            made = changes(adapter, place, there, lora.lora.weight, plain)
            for layer, change in zip(layers, made, strict=True):
                self._change(layer, change)

    def _change(self, layer: nn.Module, change: Change) -> None:
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            for kind, added in (("weight", change.factors.get("whole")), ("bias", change.bias)):
                if added is not None:
                    self._exchange(layer, kind, added)
            return
        if not hasattr(layer, _NAME):
            layer.add_module(_NAME, nn.ModuleList())
            self._beside.append((weakref.ref(layer), layer.register_forward_hook(_add, with_kwargs=True)))
        shape = torch.Size(_shape(layer))
        layer.get_submodule(_NAME).append(Branch(change, layer, shape, _computes_in(layer)))  # type: ignore[operator]

    def _exchange(self, layer: nn.Module, kind: str, added: torch.Tensor) -> None:
        now = getattr(layer, kind)
        self._exchanged.setdefault((layer, kind), now)
        new = now.data.float() + added.reshape(now.shape)
        setattr(layer, kind, nn.Parameter(new.to(now.dtype), requires_grad=False))

    def _plain(self, layer: nn.Module, kind: str) -> torch.Tensor:
        """What the model's file has there, whatever other LoRAs make of it."""
        if kind == "weight" and isinstance(layer, PackedLinear):
            return layer.numbers(torch.float32)
        now = getattr(layer, kind)
        if now is None:
            weight: Any = layer.weight
            return torch.zeros(_shape(layer)[0], device=weight.device)
        own = self._exchanged.get((layer, kind), now)
        plain: torch.Tensor = own.detach().to(now.device).float()
        return plain


def is_adapted(component: nn.Module) -> bool:
    """Whether a LoRA is in ``component``."""
    return any(isinstance(module, Branch) for module in component.modules())


def _add(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plain: torch.Tensor
) -> torch.Tensor:
    seen = args[0] if args else next(iter(kwargs.values()))
    whole = plain
    for branch in layer.get_submodule(_NAME).children():
        whole = whole + branch(seen, plain, layer)
    return whole


def _same(adapted: Sequence[weakref.ref[nn.Module]], components: Sequence[nn.Module]) -> bool:
    held = [reference() for reference in adapted]
    return len(held) == len(components) and all(a is b for a, b in zip(held, components, strict=True))


def _shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features  # a packed matrix has another shape
    weight: Any = layer.weight
    return tuple(weight.shape)


def _computes_in(layer: nn.Linear | nn.Conv2d) -> torch.dtype:
    return layer.compute_dtype if isinstance(layer, PackedLinear) else layer.weight.dtype


def _read(placed: PlacedLora) -> list[dict[str, torch.Tensor]]:
    """The tensors of each adapter, in memory of their own: as they are mapped they are pages of the file,
    which may be cut short, and count as free memory.
    """
    path = placed.lora.file.path
    try:
        with reading(path), open_safetensors(path, "cpu") as file:
            read = [
                {role: file.get_tensor(name).clone() for role, name in adapter.names.items()}
                for adapter, _ in placed.adapters
            ]
    except SafetensorError as error:
        raise FileDamaged(path, f"{path.name} cannot be read: {type(error).__name__}") from error
    for (adapter, _), tensors in zip(placed.adapters, read, strict=True):
        for tensor in tensors.values():
            if not bool(torch.isfinite(tensor.float()).all()):
                raise JobImpossible(
                    f"LoRA {path.name} has numbers that are not finite (NaN) in {adapter.layer}: its "
                    "training failed"
                )
    return read
