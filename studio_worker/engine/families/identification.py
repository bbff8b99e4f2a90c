"""Model families: which one a source is, told from its files' tensor names and shapes alone.

This module owns the one list of families that are served. File names are never looked at, and nothing is
guessed: what fits no family is refused with what was looked for, and a source that lacks a component with its
role and the forms it comes in. ``family.py`` says how to add a family.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from studio_worker.engine.families.chroma import CHROMA
from studio_worker.engine.families.component import Part
from studio_worker.engine.families.family import Blueprint, Family, refused
from studio_worker.engine.families.flux import FLUX_FAMILIES
from studio_worker.engine.families.qwen_image import QWEN_FAMILIES
from studio_worker.engine.families.recognised import packing, recognise
from studio_worker.engine.families.sd3 import SD3_FAMILIES
from studio_worker.engine.families.sdxl import SDXL, SDXL_INPAINT, SDXL_V, SDXL_V_ZSNR
from studio_worker.engine.families.stable_diffusion import SAMPLE, SD1, SD1_INPAINT, SD2, SD2_INPAINT
from studio_worker.engine.families.z_image import Z_IMAGE
from studio_worker.engine.files.sections import Section, joined, read_sections
from studio_worker.engine.files.types import check_types
from studio_worker.errors import JobError, JobImpossible
from studio_worker.models import LocalFile

_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
"""How Hugging Face's libraries name the files of a component that is saved in several."""

FAMILIES: tuple[Family, ...] = (
    SD1,
    SD1_INPAINT,
    SD2,
    SD2_INPAINT,
    SDXL_V_ZSNR,
    SDXL_V,
    SDXL,
    SDXL_INPAINT,
    SAMPLE,
    Z_IMAGE,
    *QWEN_FAMILIES,
    *FLUX_FAMILIES,
    *SD3_FAMILIES,
    CHROMA,
)
"""The first that fits wins."""


def identify(files: Sequence[LocalFile], families: Sequence[Family] = FAMILIES) -> Blueprint:
    """What the source of ``files`` is, and which file brings which component.

    A file of a component's own role wins over a whole checkpoint that holds such a component too.

    Raises:
        NotServed: no family, a family that is not served, a component that is missing, or a file that nothing
            needs.
        FileDamaged: a file is not whole.
        JobImpossible: the source names no model, or several.
    """
    wholes = sum(file.role == "model" for file in files)
    if wholes > 1:
        raise JobImpossible(f"the source names {wholes} files of role model")
    sections = read_sections(files)
    for each in sections:
        if words := packing(each):
            raise refused(
                f"{each} has its weights in {words}, which is not read here; register it in BF16 or F16, "
                "in 8-bit floats with one scale for each matrix (ComfyUI's fp8_scaled), or as GGUF"
            )
    family = next((each for each in families if each.fits(_with_joined(sections, each))), None)
    if family is None:
        raise _unknown(sections, families)
    chosen: dict[str, Section] = {}
    candidates = _with_joined(sections, family)
    for name, part in family.parts.items():
        section = _choose(part, candidates, taken=list(chosen.values()))
        if section is not None:
            chosen[name] = section
        elif name not in family.optional:
            raise _missing(family, part, sections)
    _refuse_unused(family, sections, chosen)
    for section in chosen.values():
        check_types(section)
    family.check_source(chosen[family.denoiser])
    return Blueprint(family, chosen)


def _with_joined(sections: Sequence[Section], family: Family) -> list[Section]:
    """The sections, and what becomes of those that are no part of the family alone, but may be its shards."""
    groups: dict[tuple[str, str], list[Section]] = {}
    for section in sections:
        if section.checkpoint.format == "safetensors" and not any(
            part.fits(section) for part in family.parts.values()
        ):
            groups.setdefault((section.role, section.prefix), []).append(section)
    return [*sections, *(joined(group) for group in groups.values() if len(group) > 1 and _disjoint(group))]


def _disjoint(sections: Sequence[Section]) -> bool:
    names = [name for section in sections for name in section.shapes]
    return len(names) == len(set(names))


def _choose(part: Part, sections: Sequence[Section], taken: Sequence[Section]) -> Section | None:
    fitting = [each for each in sections if each not in taken and part.fits(each)]
    fitting.sort(key=lambda each: each.role != part.role)  # stable: else the order of the source's files
    return fitting[0] if fitting else None


def _missing(family: Family, part: Part, sections: Sequence[Section]) -> JobError:
    names = " or ".join(dict.fromkeys(layout.name for layout in part.layouts))
    form = f"a file of role {part.role}, safetensors or GGUF, with {names} names"
    need = f"{family.name} needs a {part.kind}: {form}"
    near = [each for each in sections if each.role == part.role or part.resembles(each)]
    if not near:
        return refused(f"{need}; the source brings none")
    found = "; ".join(f"{each} is not it: {part.why_not(each)}" for each in near)
    return refused(f"{need}; {found}{_shards(near)}")


def _shards(sections: Sequence[Section]) -> str:
    """What to do about sections that are refused, where their files' names say that others belong to them."""
    shard = next((match for each in sections if (match := _SHARD.search(each.file.path.name))), None)
    return f"; it is published in {int(shard[1])} files: register all of them with this role" if shard else ""


def _refuse_unused(family: Family, sections: Sequence[Section], chosen: dict[str, Section]) -> None:
    used = {file for section in chosen.values() for file in section.files}
    for section in sections:
        if section.file in used:
            continue
        wanted = next(
            (p for n, p in family.parts.items() if p.role == section.role and n not in chosen), None
        )
        why = f" and no {wanted.kind} ({wanted.why_not(section)})" if wanted else ""
        raise refused(f"{family.name} has no use for {section}, which is {_what(section)}{why}")


def _unknown(sections: Sequence[Section], families: Sequence[Family]) -> JobError:
    served = ", ".join(family.name for family in families)
    if not sections:
        return JobImpossible("the source names no file of role model or diffusion-model")
    for section in sections:
        if section.role in {"model", "diffusion-model"} and (name := recognise(section.checkpoint)):
            return refused(f"{section} is {name}, which this worker does not serve; it serves {served}")
    denoisers = [each for each in sections if each.role in {"model", "diffusion-model"}]
    if not denoisers:
        return JobImpossible(
            f"the source names no file of role model or diffusion-model, only {', '.join(map(str, sections))}"
        )
    for section in denoisers:
        for family in families:
            part = family.parts[family.denoiser]
            if part.has_names(section):
                return refused(f"{section} is like {family.name}, but {part.why_not(section)}")
    names = list(denoisers[0].checkpoint.shapes)
    return refused(
        f"{denoisers[0]} is of no known model family; it has {len(names)} tensors, among them "
        f"{', '.join(names[:3])}{_shards(denoisers)}; served: {served}"
    )


def _what(section: Section) -> str:
    return recognise(section.checkpoint) or "of no known kind"
