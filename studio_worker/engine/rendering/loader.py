"""A model to where its next picture is made: the way chosen, room made, missing components read.

This module owns the order of these; what fits is placement.py's, what stays is residency.py's to say.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

import torch

from studio_worker.engine.families.family import Blueprint, JobKind
from studio_worker.engine.loading import computed_in, load_part, use_channels_last, weights_dtype
from studio_worker.engine.loras.wanted import Lora
from studio_worker.engine.memory.held import Place
from studio_worker.engine.memory.machine import Memory
from studio_worker.engine.memory.placement import Footprint, Mode, Plan, Space, choose, leanest
from studio_worker.engine.memory.residency import Key, Residency
from studio_worker.engine.rendering.compiling import compile_blocks
from studio_worker.engine.rendering.needs import footprint
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.engine.rendering.prompts import PromptCache
from studio_worker.errors import JobCancelled
from studio_worker.models import CliDefaults

_LOG = logging.getLogger(__name__)


class Loader:
    """Loads models for one device. For one thread."""

    def __init__(
        self, device: torch.device, memory: Memory, residency: Residency, *, compiles: bool = False
    ) -> None:
        self._device = device
        self._memory = memory
        self._residency = residency
        self._prompts = PromptCache()
        self._compiles = compiles

    def footprint(
        self,
        blueprint: Blueprint,
        pixels: int,
        *,
        kind: JobKind = "text",
        guided: bool = True,
        loras: tuple[Lora, ...] = (),
    ) -> Footprint:
        """What a picture needs here; arguments as of :func:`.needs.footprint`."""
        files = [lora.file for lora in loras]
        numbers = computed_in(blueprint.family, self._device)
        return footprint(blueprint, numbers, pixels, kind=kind, guided=guided, loras=files)

    def plan(self, blueprint: Blueprint, needed: Footprint, defaults: CliDefaults) -> Plan:
        """How the picture is made.

        Raises:
            JobError: there is no way; retryable.
        """
        space = Space(
            str(self._device),
            available=self._memory.on_device(self._residency.size_bytes()),
            host=self._host_bytes(),
            spare=self._residency.spare_bytes(self._keys(blueprint).values()),
        )
        offload = bool(defaults.offload_to_cpu)
        return choose(needed, space, offload=offload, allowed=_allowed_bytes(defaults))

    def leanest(self, needed: Footprint) -> Plan:
        """The way that takes least, whether there is so much or not."""
        return leanest(needed, host=self._host_bytes())

    def others_bytes(self, blueprint: Blueprint) -> int:
        """Of the components on the device, those that are not this model's."""
        own = self._keys(blueprint).values()
        return self._residency.size_bytes() - self._residency.size_bytes_of(own, Place.DEVICE)

    def is_alone(self, blueprint: Blueprint) -> bool:
        """Whether no component of another model is loaded anywhere."""
        own = self._keys(blueprint).values()
        return all(self._residency.size_bytes(p) == self._residency.size_bytes_of(own, p) for p in Place)

    def _host_bytes(self) -> int:
        """What RAM has for components that wait, once all others have left it."""
        return self._memory.on_host(self._residency.ram_bytes()) if self._memory.has_host else 0

    def load(
        self,
        name: str,
        blueprint: Blueprint,
        plan: Plan,
        loras: tuple[Lora, ...],
        go_on: Callable[[], bool],
    ) -> tuple[LoadedModel, float]:
        """The model that the studio calls ``name``, where ``plan`` wants it, and the seconds that took: 0
        where all of its components were there.

        Raises:
            JobCancelled: ``go_on`` said no between two components; it is called after each tensor too, as a
                sign of life, and may raise.
        """
        family, residency = blueprint.family, self._residency
        started = time.perf_counter()
        keys = self._keys(blueprint)
        place = Place.DEVICE if plan.mode is Mode.WHOLE else Place.RAM
        coming = self._make_room(blueprint, plan, place)
        parts: dict[str, torch.nn.Module | None] = {
            part: residency.get(keys[part], place) if part in keys else None for part in family.parts
        }
        if place is Place.RAM:
            residency.make_room(0, plan.peak_bytes, keep=keys.values())
        missing = [part for part in keys if parts[part] is None]
        for part in missing:
            if not go_on():
                raise JobCancelled
            parts[part] = self._read(blueprint, part, place, go_on)
        changed = missing + self._unpack(plan, keys, go_on)
        denoiser = parts[family.denoiser]
        if self._compiles and denoiser is not None and family.denoiser in changed:
            compile_blocks(denoiser)
        residency.name(name, keys.values())
        readers = tuple(key for part, key in keys.items() if part not in {family.denoiser, "vae"})
        model = LoadedModel(family, parts, plan, self._device, self._prompts, (family.name, readers, loras))
        if not coming:
            return model, 0.0
        load_s = time.perf_counter() - started
        _LOG.info(
            "model loaded",
            extra={
                "family": family.name,
                "components": missing,
                "moved": [part for part in coming if part not in missing],
                "mode": plan.mode.value,
                "unpacked": [part for part, key in keys.items() if residency.is_unpacked(key)],
                "load_s": load_s,
                "resident_bytes": residency.size_bytes(),
            },
        )
        return model, load_s

    def _make_room(self, blueprint: Blueprint, plan: Plan, place: Place) -> list[str]:
        """Have others leave for what comes to ``place``; returns the components that do."""
        residency, keys = self._residency, self._keys(blueprint)
        residency.drop_torn(keys.values())
        unpacked = [keys[part] for part in plan.unpacked]
        for key in keys.values():
            if key not in unpacked:
                residency.pack(key)
        itemsize = weights_dtype(blueprint.family, self._device).itemsize
        coming = {
            part: blueprint.sections[part].size_bytes(itemsize)
            for part, key in keys.items()
            if residency.place(key) is not place
        }
        if place is Place.DEVICE:
            residency.make_room(sum(coming.values()), plan.working_bytes, keep=keys.values())
        else:
            new = sum(size for part, size in coming.items() if residency.place(keys[part]) is None)
            residency.make_host_room(new + residency.lacking_bytes(keys.values()), keep=keys.values())
        return list(coming)

    def _read(
        self, blueprint: Blueprint, part: str, place: Place, go_on: Callable[[], bool]
    ) -> torch.nn.Module:
        """One component from its file to ``place``, where it stays."""
        dtype = weights_dtype(blueprint.family, self._device)
        where = self._device if place is Place.DEVICE else torch.device("cpu")
        component = load_part(blueprint.family.parts[part], blueprint.sections[part], where, dtype, go_on)
        if part == "vae" and self._device.type == "cuda":  # on a CPU 1 to 3% faster, but of other bits
            use_channels_last(component)
        self._residency.add(self._keys(blueprint)[part], component, place)
        return component

    def _unpack(self, plan: Plan, keys: Mapping[str, Key], go_on: Callable[[], bool]) -> list[str]:
        """Write the quantised weights out that ``plan`` wants so; returns the components that were not."""
        packed = [part for part in plan.unpacked if not self._residency.is_unpacked(keys[part])]
        for part in packed:
            self._residency.unpack(keys[part], go_on)
        return packed

    def preload(
        self,
        name: str,
        blueprint: Blueprint,
        needed: Footprint,
        defaults: CliDefaults,
        go_on: Callable[[], bool],
    ) -> bool:
        """Load a model unless others would have to leave for it; whether it is wholly loaded."""
        residency, memory = self._residency, self._memory
        own = self._keys(blueprint).values()
        plan = self.plan(blueprint, needed, defaults)
        on_device, in_ram = (
            residency.size_bytes(place) - residency.size_bytes_of(own, place) for place in Place
        )  # of others
        if on_device + plan.peak_bytes > memory.on_device(residency.size_bytes()):
            return False
        if plan.mode is not Mode.WHOLE and in_ram + needed.weight_bytes > self._host_bytes():
            return False
        try:
            self.load(name, blueprint, plan, (), go_on)
        except JobCancelled:
            return False
        return True

    def _keys(self, blueprint: Blueprint) -> dict[str, Key]:
        dtype, parts = weights_dtype(blueprint.family, self._device), blueprint.family.parts
        return {
            name: Key(parts[name].identity, section.content, dtype)
            for name, section in blueprint.sections.items()
        }


def _allowed_bytes(defaults: CliDefaults) -> int | None:
    """What of the device the model's source allows; ``None`` where it bounds nothing, as 0 and less do in
    stable-diffusion.cpp, too.
    """
    allowed = (defaults.max_vram_gib or 0) * 2**30
    return int(allowed) if 0 < allowed < math.inf else None
