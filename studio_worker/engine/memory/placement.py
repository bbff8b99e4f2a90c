"""Where a model's components are while a picture is made: what a job needs, against what there is.

Rules without torch, so that they can be asked before a job is accepted; the figures come from needs.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from studio_worker.errors import JobError


class Mode(Enum):
    """How much of a model is on the device at a time."""

    WHOLE = "whole"
    COMPONENT = "component"
    """One component after the other, from RAM."""
    LAYERS = "layers"
    """One layer after the other, from RAM; slow."""


class Way(NamedTuple):
    """What of a plan is no figure."""

    mode: Mode
    tiled: bool
    unpacked: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """How a picture is made.

    Attributes:
        tiled: whether the VAE decodes it piece by piece.
        peak_bytes: what the device has to have.
        working_bytes: what of that is not weights, where the model is whole on the device.
        unpacked: names of the components whose quantised matrices are written out as plain numbers once, when
            they are loaded; all others keep them packed, and unpack them each time that they are used.
    """

    mode: Mode
    tiled: bool
    peak_bytes: int
    working_bytes: int = 0
    unpacked: frozenset[str] = frozenset()

    @property
    def way(self) -> Way:
        return Way(self.mode, self.tiled, self.unpacked)


@dataclass(frozen=True)
class Footprint:
    """What a picture needs. Bytes.

    Attributes:
        weights: by component, as they are once loaded.
        denoising, decoding: what lives beside the weights while the denoiser works, and the VAE.
        tile: the latter where it decodes in tiles.
        reading: likewise by text encoder.
        layers: by component, weights of its two largest layers: what is there of it at once where they come
            one by one (offloading.py).
        unpacking: by component, what one of its quantised matrices takes for a moment when it is used.
        unpacked: weights with quantised matrices written out, for the components that have any.
        loras: weights of LoRAs, beside the denoiser's.
        model, pixels: what of, for what was learnt of it.
        took: by way, what such pictures are known to take at least.
    """

    weights: Mapping[str, int]
    denoiser: str
    vae: str
    denoising: int
    decoding: int
    tile: int
    reading: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    unpacking: Mapping[str, int] = field(default_factory=dict)
    unpacked: Mapping[str, int] = field(default_factory=dict)
    loras: int = 0
    model: Hashable = None
    pixels: int = 0
    took: Mapping[Way, int] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """All components together, packed."""
        return sum(self.weights.values())

    def plans(self) -> tuple[Plan, ...]:
        """Every way to make it, the fastest first. Tiles show, faintly, so that they come after packed
        weights; what is not whole on the device is packed, since it goes there for every job.
        """
        whole = [self._plan(Mode.WHOLE, tiled=False, unpacked=names) for names in self._unpackings()]
        others = [self._plan(mode, tiled) for mode in Mode for tiled in (False, True)]
        return tuple(self._corrected(plan) for plan in (*whole, *others))

    def _corrected(self, plan: Plan) -> Plan:
        more = self.took.get(plan.way, 0) - plan.peak_bytes
        if more <= 0:
            return plan
        return replace(plan, peak_bytes=plan.peak_bytes + more, working_bytes=plan.working_bytes + more)

    def _unpackings(self) -> list[frozenset[str]]:
        """Which components to unpack, the most first. The denoiser before all: it runs at every step."""
        every, alone = frozenset(self.unpacked), self.unpacked.keys() & {self.denoiser}
        return list(dict.fromkeys(each for each in (every, frozenset(alone)) if each))

    def _plan(self, mode: Mode, tiled: bool, unpacked: frozenset[str] = frozenset()) -> Plan:
        weights, texts = self.weights, self.reading.keys() & self.weights.keys()
        vae, decoding = weights.get(self.vae, 0), self.tile if tiled else self.decoding

        def moment(name: str) -> int:
            return 0 if name in unpacked else self.unpacking.get(name, 0)

        denoising = self.loras + self.denoising + moment(self.denoiser)
        reading = {name: self.reading[name] + moment(name) for name in texts}
        if mode is Mode.WHOLE:
            here = sum((self.unpacked if name in unpacked else weights)[name] for name in weights)
            working = max(denoising, self.loras + max(decoding, *reading.values(), 0))
            return Plan(mode, tiled, here + working, working, unpacked)
        there = weights
        if mode is Mode.LAYERS:  # a VAE comes as a whole
            there = {name: self.layers.get(name, 0) for name in weights}
        texts_bytes = [there[name] + working for name, working in reading.items()]
        return Plan(mode, tiled, max(there[self.denoiser] + denoising, vae + decoding, *texts_bytes))


@dataclass(frozen=True)
class Space:
    """What there is for a model and its picture.

    Args:
        device: its name.
        available: bytes of it, once all others have left it.
        host: bytes of RAM in which components can wait; 0 where RAM is the device.
        spare: how many of the available bytes the model and its picture have without others' leaving the
            device. Weights are unpacked only within these; 0 where nothing is unpacked.
    """

    device: str
    available: int
    host: int
    spare: int = 0


def choose(needed: Footprint, space: Space, *, offload: bool, allowed: int | None = None) -> Plan:
    """The fastest way to make the picture within the available bytes of the device.

    Args:
        offload: the model asks for that (``offloadToCpu``).
        allowed: within how many of the bytes the model asks to stay (``maxVramGib``). Where no way is as
            lean, the leanest that the device has room for is taken.

    Raises:
        JobError: there is none; another worker may have more.
    """
    available, host = space.available, space.host
    plans = [plan for plan in needed.plans() if _can_wait(needed, plan, host)]
    if offload:
        plans = [plan for plan in plans if plan.mode is not Mode.WHOLE] or plans
    limit = available if allowed is None else min(available, allowed)
    for plan in plans:
        if plan.peak_bytes <= (min(space.spare, limit) if plan.unpacked else limit):
            return plan
    leanest_plan = min(plans, key=lambda plan: plan.peak_bytes)
    least = leanest_plan.peak_bytes
    if least <= available:
        return leanest_plan
    weights = needed.weight_bytes
    waiting = (
        f"; its weights cannot wait in RAM, since they are {weights / 2**30:.1f} GiB and it has "
        f"{host / 2**30:.1f} GiB for them"
        if 0 < host < weights
        else ""
    )
    raise JobError(
        f"the picture needs {least / 2**30:.1f} GiB and {space.device} has {available / 2**30:.1f} GiB for it"
        f"{waiting}; a smaller picture, a smaller quantisation of the model, or a device with more memory is "
        "needed"
    )


def leanest(needed: Footprint, *, host: int) -> Plan:
    """The way that needs least of the device; ``host`` as above."""
    plans = (plan for plan in needed.plans() if _can_wait(needed, plan, host))
    return min(plans, key=lambda plan: plan.peak_bytes)


def _can_wait(needed: Footprint, plan: Plan, host: int) -> bool:
    """Whether the weights that ``plan`` has wait in RAM have room there."""
    return plan.mode is Mode.WHOLE or needed.weight_bytes <= host
