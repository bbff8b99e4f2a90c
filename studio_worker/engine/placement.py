"""Where a model's components are while a picture is made: what a job needs, against what there is.

Rules without torch, from the headers of the files alone, so that they can be asked before a job is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from studio_worker.engine.families.component import read_json
from studio_worker.engine.families.family import Blueprint
from studio_worker.engine.precision import SIZE_BYTES
from studio_worker.errors import JobError

_DENOISER_BYTES_PER_PIXEL = 600
"""What a denoiser in half precision has in memory beside its weights, with guidance. Measured on the meta
device (every tensor alive at the peak, attention fused): 520 for Stable Diffusion 1.x, 316 for SDXL."""

_VAE_FULL_MAPS = 3
"""Feature maps of the last but one width, at the picture's full size, that are alive at once at the peak of a
VAE's decoder: exactly that many for AutoencoderKL at 512, 1024 and 2048 pixels, measured likewise."""

_VAE_WIDTH = 256
"""That width, where a VAE's configuration does not say it."""

_TEXT_BYTES = 64 << 20
"""What a text encoder has in memory beside its weights: a few hundred tokens."""

_LAYERS_SHARE = 0.1
"""How much of a denoiser is on the device at a time when its layers come one by one: generously, since the
widest layer of the models served is below a twentieth."""


class Mode(Enum):
    """How much of a model is on the device at a time."""

    WHOLE = "whole"
    COMPONENT = "component"
    """One component after the other, from RAM."""
    LAYERS = "layers"
    """One layer after the other, from RAM; slow."""


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


@dataclass(frozen=True)
class Footprint:
    """What a picture needs. Bytes; ``weights`` by component, as they are once loaded; ``unpacked`` likewise,
    where quantised matrices are written out, for the components that have any.
    """

    weights: Mapping[str, int]
    denoiser: str
    vae: str
    denoising: int
    decoding: int
    tile: int
    unpacked: Mapping[str, int] = field(default_factory=dict)

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
        return (*whole, *others)

    def _unpackings(self) -> list[frozenset[str]]:
        """Which components to unpack, the most first. The denoiser before all: it runs at every step."""
        every, alone = frozenset(self.unpacked), self.unpacked.keys() & {self.denoiser}
        return list(dict.fromkeys(each for each in (every, frozenset(alone)) if each))

    def _plan(self, mode: Mode, tiled: bool, unpacked: frozenset[str] = frozenset()) -> Plan:
        decoding = self.tile if tiled else self.decoding
        weights, denoiser = self.weights, self.weights[self.denoiser]
        vae = weights.get(self.vae, 0)
        if mode is Mode.WHOLE:
            here = sum((self.unpacked if name in unpacked else weights)[name] for name in weights)
            working = max(self.denoising, decoding)
            return Plan(mode, tiled, here + working, working, unpacked)
        if mode is Mode.COMPONENT:
            texts = [size + _TEXT_BYTES for size in weights.values()]
            return Plan(mode, tiled, max(denoiser + self.denoising, vae + decoding, *texts))
        layers = int(max(weights.values()) * _LAYERS_SHARE)
        return Plan(mode, tiled, vae + max(layers + self.denoising, decoding))


def footprint(blueprint: Blueprint, numbers: str, pixels: int, *, is_edit: bool = False) -> Footprint:
    """What a picture of ``pixels`` of this model needs, computed in ``numbers`` (precision.py)."""
    family, itemsize = blueprint.family, SIZE_BYTES[numbers]
    weights = {name: section.size_bytes(itemsize) for name, section in blueprint.sections.items()}
    config = read_json(family.parts["vae"].config / "config.json") if "vae" in family.parts else {}
    widths = config.get("block_out_channels") or [_VAE_WIDTH]
    # VAEs in float16 decode in single precision.
    precise = 4 if numbers == "float16" else itemsize
    per_pixel = _VAE_FULL_MAPS * widths[min(1, len(widths) - 1)] * precise
    copy = weights.get("vae", 0) * (precise // itemsize - 1)
    tile_pixels = min(pixels, int(config.get("sample_size") or 512) ** 2)
    seen = pixels + (family.reference_pixels if is_edit else 0)
    picture = 3 * 4 * pixels * 2  # the tiles, and the picture that they are put together to
    plain = {
        name: section.size_bytes(itemsize, unpacked=True) for name, section in blueprint.sections.items()
    }
    return Footprint(
        weights=weights,
        denoiser=family.denoiser,
        vae="vae",
        denoising=_DENOISER_BYTES_PER_PIXEL * seen * itemsize // 2,
        decoding=per_pixel * pixels + copy,
        tile=per_pixel * tile_pixels + picture + copy,
        unpacked={name: size for name, size in plain.items() if size > weights[name]},
    )


def choose(
    needed: Footprint, available: int, *, host: int, offload: bool, device: str, spare: int = 0
) -> Plan:
    """The fastest way to make the picture within ``available`` bytes of the device.

    Args:
        spare: how many of them the model and its picture have without others' leaving the device. Weights are
            unpacked only within these; 0 where nothing is unpacked.
        host: bytes of RAM in which components can wait; 0 where RAM is the device.
        offload: the model asks for that (``offloadToCpu``).

    Raises:
        JobError: there is none; another worker may have more.
    """
    plans = [plan for plan in needed.plans() if _can_wait(needed, plan, host)]
    if offload:
        plans = [plan for plan in plans if plan.mode is not Mode.WHOLE] or plans
    for plan in plans:
        if plan.peak_bytes <= (min(spare, available) if plan.unpacked else available):
            return plan
    least = min(plan.peak_bytes for plan in plans)
    weights = needed.weight_bytes
    waiting = (
        f"; its weights cannot wait in RAM, since they are {weights / 2**30:.1f} GiB and it has "
        f"{host / 2**30:.1f} GiB for them"
        if 0 < host < weights
        else ""
    )
    raise JobError(
        f"the picture needs {least / 2**30:.1f} GiB and {device} has {available / 2**30:.1f} GiB for it"
        f"{waiting}; a smaller picture, a smaller quantisation of the model, or a device with more memory is "
        "needed"
    )


def leaner(needed: Footprint, failed: Plan, *, host: int) -> Plan | None:
    """The next way that needs clearly less than one for which memory did not suffice; ``host`` as above."""
    for plan in needed.plans():
        is_leaner = plan.peak_bytes < 0.9 * failed.peak_bytes and not plan.unpacked
        if is_leaner and _can_wait(needed, plan, host):
            return plan
    return None


def _can_wait(needed: Footprint, plan: Plan, host: int) -> bool:
    """Whether the weights that ``plan`` has wait in RAM have room there."""
    return plan.mode is Mode.WHOLE or needed.weight_bytes <= host
