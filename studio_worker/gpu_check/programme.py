"""Which rows there are, in order of worth: what is proven first is what an operator would miss most.

Everything is written down here without torch, so that the process that leads the check never has the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

from studio_worker.engine.families import FAMILIES
from studio_worker.gpu_check.rows import Row

FORMS = ("safetensors", "Q4_K", "Q8_0", "8-bit")
PLACES = ("whole", "component", "layers")
KINDS = ("text", "image", "mask", "image", "mask")
CASES = ("z-image", "sdxl")


def rows(*, small: bool) -> tuple[Row, ...]:
    """The whole check, or with ``small`` a rehearsal in which every kind of row comes."""
    first, rest = (_rehearsed(), ()) if small else (_families(FORMS[:1]), _families(FORMS[1:]))
    return (*_service(), *first, *_behaviour(), *_speed(), *rest)


def _service() -> Iterator[Row]:
    yield Row("libraries", "service:libraries", limit_s=120)
    yield Row("a GPU that is not there", "service:absent", limit_s=60)
    yield Row("doctor", "service:doctor", limit_s=60)
    yield Row("service, sample model", "service:service", limit_s=240)


def _families(forms: Sequence[str]) -> Iterator[Row]:
    for form in forms:
        for family in FAMILIES:
            yield _family(family.name, form)


def _family(family: str, form: str, **given: object) -> Row:
    given = {"family": family, "form": form, **given}
    return Row(f"{family}, {form}", "matrix:compare", given, limit_s=90, together=True)


def _rehearsed() -> Iterator[Row]:
    """Each family once: form, place, kind of job and LoRA change from one to the next."""
    forms, places, loras, kinds = cycle(FORMS), cycle(PLACES), cycle((False, True)), cycle(KINDS)
    for family in FAMILIES:
        form = next(forms)
        given = {"places": [next(places)], "loras": [next(loras)], "kinds": [next(kinds)]}
        yield _family(family.name, form, **given)


def _behaviour() -> Iterator[Row]:
    yield Row("every sampler, UNet", "matrix:samplers", {"flow": False}, limit_s=90, together=True)
    yield Row("every sampler, flow", "matrix:samplers", {"flow": True}, limit_s=90, together=True)
    yield Row("after a cancelled job", "returning:cancelled", limit_s=60)
    yield Row("after memory ran out", "returning:exhausted", limit_s=60)
    yield Row("after a switch of models", "returning:switched", limit_s=60)


def _speed() -> Iterator[Row]:
    for case in CASES:
        given = {"case": case}
        yield Row(f"{case}: files and first job", "full_size:first_job", given, limit_s=90)
        yield Row(f"{case}: beside the plain pipeline", "full_size:beside_plain", given, limit_s=90)
        yield Row(f"{case}: 30 jobs in a row", "full_size:in_a_row", given, limit_s=120)
        if case == "z-image":
            yield Row(f"{case}: lanes behind a slow link", "lanes:slow_link", given, limit_s=60)
        yield Row(f"{case}: inside the steps", "full_size:inside", given, limit_s=60)
        if case == "z-image":
            yield Row(f"{case}: packed beside unpacked", "full_size:packed", given, limit_s=60)
    yield Row("switch between models: RAM, disk", "switching:switch", limit_s=90)
    yield Row("sdxl: compiled", "full_size:compiled", {"case": "sdxl"}, limit_s=150)
