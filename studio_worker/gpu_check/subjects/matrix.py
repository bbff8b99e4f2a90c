"""Every family in every form, placed in every way, for every kind of job, with a LoRA and without.

A tiny model's picture on the device is compared with the one that the same engine makes of the same files on
the CPU, where numbers are single precision. How far apart they may be is stated by the type that the device
computes in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.family import Family, JobKind
from studio_worker.engine.memory.placement import Mode
from studio_worker.engine.sampling.samplers import SAMPLERS
from studio_worker.gpu_check.rows import Missed
from studio_worker.gpu_check.subjects.asking import SAMPLE, Kind, kinds_of, levels_apart, make, pixels
from studio_worker.gpu_check.subjects.estimates import Room, plans
from studio_worker.gpu_check.subjects.lab import Lab
from studio_worker.gpu_check.tiny.families import NARROW, WIDTH, tiny
from studio_worker.gpu_check.tiny.model import Form, Tiny
from studio_worker.jobs import Picture
from studio_worker.models import LocalFile

BOUND_LEVELS = {"bfloat16": 5.0, "float16": 1.0, "float32": 0.5}
"""By how many levels of 255 a picture may differ from the CPU's on average, by the type it was computed in.
In half precision: twice what the same models show on a CPU that is told to compute so.
"""

COARSE, COARSE_TIMES = ("flux1-dev", "flux1-schnell", "flux1-fill", "chroma"), 4.0
"""They are told time and guidance as numbers up to 3500 in the type that they compute in, which are coarse in
bfloat16: the library does so, and whoever computes so differs as much more.
"""

SHOWS_LEVELS = 5.0
"""A picture whose numbers spread less shows nothing that could be compared."""

PLACES = ("whole", "component", "layers")
"""The engine's words for how much of a model is on the device at a time."""

PLACES_APART_LEVELS = 1.0
"""What is computed is the same wherever weights wait; more than this is another picture."""


class Cell(NamedTuple):
    """One picture to compare."""

    kind: Kind
    with_lora: bool

    def __str__(self) -> str:
        return f"{self.kind}{' with LoRA' if self.with_lora else ''}"


def compare(
    lab: Lab,
    family: str,
    form: Form,
    places: Sequence[str] = PLACES,
    kinds: Sequence[Kind] | None = None,
    loras: Sequence[bool] = (False, True),
) -> None:
    """The tiny model of ``family`` in ``form``; in a rehearsal a narrow one, which is quick, where the form
    lets it be: blocks of K-quantisations need wide ones.

    Args:
        kinds: of jobs, as far as the family has them; all, if it has none of these.
    """
    _read_small_references()
    width = NARROW if lab.small and form != "Q4_K" else WIDTH
    with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
        model = tiny(family, Path(folder), width)
        has = kinds_of(model.family)
        wanted = [kind for kind in has if kinds and kind in kinds] or has
        cells = [Cell(kind, lora) for lora in loras for kind in wanted]
        _compare(lab, model, form, places, cells)


def bound_levels(family: Family, picture: Picture) -> float:
    """How far from the CPU's a picture may be."""
    numbers = picture.meta["dtype"]
    is_coarse = numbers == "bfloat16" and family.name.removeprefix("tiny-") in COARSE
    return BOUND_LEVELS[numbers] * (COARSE_TIMES if is_coarse else 1.0)


def _compare(lab: Lab, model: Tiny, form: Form, places: Sequence[str], cells: Sequence[Cell]) -> None:
    plain = model.files(form, torch.float16)
    asked = Asked({False: plain, True: (*plain, model.lora())}, guidance=_guidance(model.family))
    reference = DiffusionEngine("cpu", families=(model.family,))
    expected = {cell: make(reference, **asked.of(cell)) for cell in cells}
    for cell, picture in expected.items():
        if float(pixels(picture).std()) < SHOWS_LEVELS:
            raise Missed(f"the CPU's picture of {cell} shows nothing")
    levels: dict[str, float] = {}
    wrong: list[str] = []
    at_first: dict[Cell, Picture] = {}
    for place in places:
        room = Room()
        engine = DiffusionEngine(lab.device, families=(model.family,), memory=room)
        for cell in cells:
            name = f"{place}, {cell}"
            if place == "layers":
                room.device_bytes = _layers_bytes(lab, model.family, asked, cell, expected[cell])
            try:
                picture = make(engine, **asked.of(cell), offload=place != "whole")
            except Exception as error:  # the next cell is looked at all the same
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
                if not lab.gpu.works():
                    raise
                continue
            levels[name] = levels_apart(picture, expected[cell])
            lab.note(pictures=len(levels), worst_levels=max(levels.values()), dtype=picture.meta["dtype"])
            first = at_first.setdefault(cell, picture)
            if problems := [*_problems(model, place, cell, picture, first, expected)]:
                wrong.append(f"{name}: {', '.join(problems)}")
    lab.note(levels={name: round(apart, 3) for name, apart in levels.items()})
    if wrong:
        raise Missed(f"{len(wrong)} of {len(cells) * len(places)} pictures: {'; '.join(wrong[:4])}")


def _problems(
    model: Tiny,
    place: str,
    cell: Cell,
    picture: Picture,
    first: Picture,
    expected: Mapping[Cell, Picture],
) -> Iterator[str]:
    """What is wrong with ``picture``; ``first`` is the same one, made in the first of the places."""
    apart, bound = levels_apart(picture, expected[cell]), bound_levels(model.family, picture)
    if apart > bound:
        yield f"{apart:.2f} levels from the CPU's picture, {bound:g} are allowed"
    twin = expected.get(Cell(cell.kind, not cell.with_lora))
    if twin is not None and levels_apart(picture, twin) <= apart:
        yield f"nearer to the CPU's picture {'without LoRA' if cell.with_lora else 'with it'}"
    if (moved := levels_apart(picture, first)) > PLACES_APART_LEVELS:
        yield f"{moved:.2f} levels from the same one placed otherwise"
    if (was := picture.meta.get("offload", "whole")) != place:
        yield f"it was placed {was}"


def _layers_bytes(lab: Lab, family: Family, asked: Asked, cell: Cell, made: Picture) -> int:
    """How large a device is on which one component is too much at a time, and layers are not."""
    pixels = made.meta["width"] * made.meta["height"]
    kind: JobKind = "inpaint" if cell.kind == "mask" else cell.kind
    files, is_guided = asked.files[cell.with_lora], asked.guidance != 1
    ways = plans(files, family, lab.device, pixels, kind=kind, guided=is_guided)
    return min(way.peak_bytes for way in ways if way.mode is Mode.COMPONENT) - 1


class Asked(NamedTuple):
    """What the pictures of one model have in common: its files without LoRA and with, and the guidance."""

    files: dict[bool, tuple[LocalFile, ...]]
    guidance: float

    def of(self, cell: Cell) -> dict[str, Any]:
        """Arguments of :func:`make`."""
        return {
            "files": self.files[cell.with_lora],
            "kind": cell.kind,
            "cfg_scale": self.guidance,
            # Of four steps from a picture two are made.
            **({"steps": 4, "denoise": 0.5} if cell.kind in {"image", "mask"} else {"steps": 2}),
        }


def _guidance(family: Family) -> float:
    """FLUX.1 Fill, which does nothing but inpaint, has none of this kind."""
    return 1.0 if family.flow and kinds_of(family) == ("mask",) else 3.0


def samplers(lab: Lab, *, flow: bool) -> None:
    """Every sampler once, of models that predict noise or of those that predict a flow."""
    with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
        if flow:
            model = tiny("z-image", Path(folder))
            _sample(lab, model.files(), 1.0, families=(model.family,))
        else:
            _sample(lab, (SAMPLE,), 4.0)


def _sample(lab: Lab, files: Sequence[LocalFile], guidance: float, **engine: Any) -> None:
    ours, reference = (DiffusionEngine(device, **engine) for device in (lab.device, "cpu"))
    wrong: list[str] = []
    levels: dict[str, float] = {}
    for name in SAMPLERS:
        asked: dict[str, Any] = {
            "sampling_method": name,
            "steps": 2 if lab.small else 4,
            "cfg_scale": guidance,
        }
        picture = make(ours, files, **asked)
        levels[name] = apart = levels_apart(picture, make(reference, files, **asked))
        lab.note(samplers=len(levels), worst_levels=max(levels.values()))
        if apart > BOUND_LEVELS[picture.meta["dtype"]]:
            wrong.append(f"{name} {apart:.2f}")
    lab.note(levels={name: round(apart, 3) for name, apart in levels.items()})
    if wrong:
        raise Missed(f"too far from the CPU's picture, in levels: {', '.join(wrong)}")


def _read_small_references() -> None:
    """Qwen's vision encoder sees small pictures too: on the device and the CPU alike."""
    pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = 112 * 112
