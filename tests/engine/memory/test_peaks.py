"""What is learnt from pictures that took more memory than they should have, or ran out of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from studio_worker.engine.memory.peaks import Peaks
from studio_worker.engine.memory.placement import Footprint, Mode, Plan
from tests.lab.memory import GIB, needs

PIXELS = 1024 * 1024


def of(model: str = "a", pixels: int = PIXELS, **changed: Any) -> Footprint:
    return needs(model=model, pixels=pixels, **changed)


def peak(peaks: Peaks, needed: Footprint, mode: Mode = Mode.WHOLE, *, tiled: bool = False) -> float:
    """What is planned for that way now, in GiB."""
    plans = peaks.corrected(needed).plans()
    return (
        next(p.peak_bytes for p in plans if (p.mode, p.tiled, p.unpacked) == (mode, tiled, frozenset())) / GIB
    )


def whole(needed: Footprint) -> Plan:
    return next(plan for plan in needed.plans() if plan.way == (Mode.WHOLE, False, frozenset()))


def test_plan_is_by_what_the_last_picture_took() -> None:
    """A picture that took more than was estimated is planned with what it took, and so are larger ones of the
    same model; smaller ones, and other models, are not.
    """
    peaks = Peaks()
    assert peak(peaks, of()) == 18
    peaks.took(of(), whole(of()), 20 * GIB)
    assert peak(peaks, of()) == 20
    assert peak(peaks, of(pixels=2 * PIXELS)) == 20
    assert peak(peaks, of(pixels=PIXELS - 1)) == 18
    assert peak(peaks, of("b")) == 18
    corrected = whole(peaks.corrected(of()))
    assert corrected.working_bytes - whole(of()).working_bytes == 2 * GIB


def test_picture_that_took_less_is_planned_as_estimated() -> None:
    """An estimate is never lowered by what one picture took: another prompt may take more."""
    peaks = Peaks()
    peaks.took(of(), whole(of()), 12 * GIB)
    assert peak(peaks, of()) == 18


def test_way_that_ran_out_needs_more_than_it_had() -> None:
    """A way for which 20 GiB did not suffice is planned with more, and so is every way that should need about
    as much; ways that should need clearly less are as they were.
    """
    peaks = Peaks()
    peaks.ran_out(of(), whole(of()), 20 * GIB)
    assert peak(peaks, of()) == pytest.approx(22)
    assert peak(peaks, of(), Mode.WHOLE, tiled=True) == pytest.approx(16)  # estimated at 16 of 18
    assert peak(peaks, of(), Mode.COMPONENT) == 11
    close = {"decoding": 3 * GIB, "tile": 2.9 * GIB}
    peaks.ran_out(of("b", **close), whole(of("b", **close)), 20 * GIB)
    assert peak(peaks, of("b", **close), Mode.WHOLE, tiled=True) == pytest.approx(22)


def test_unpacked_weights_are_tried_no_more_where_packed_ones_ran_out() -> None:
    """Where there was no room with packed weights, there is none with unpacked ones."""
    peaks, needed = Peaks(), of(unpacked={"transformer": 20 * GIB})
    peaks.ran_out(needed, whole(needed), 30 * GIB)
    plans = [plan for plan in peaks.corrected(needed).plans() if plan.mode is Mode.WHOLE and not plan.tiled]
    assert len(plans) == 2
    assert all(plan.peak_bytes >= 33 * GIB for plan in plans)


def test_picture_that_is_made_after_all_takes_it_back() -> None:
    """Where memory ran out because another program had it for a while, the next picture that is made that way
    shows what it really takes.
    """
    peaks = Peaks()
    peaks.ran_out(of(pixels=PIXELS // 2), whole(of()), 20 * GIB)
    peaks.took(of(), whole(of()), 19 * GIB)
    assert peak(peaks, of()) == 19
    assert peak(peaks, of(pixels=PIXELS // 2)) == 18


def test_what_is_learnt_is_bounded() -> None:
    """A box that makes pictures of ever new models keeps a few hundred figures, those of the last."""
    peaks = Peaks()
    for number in range(1000):
        peaks.took(of(str(number)), whole(of()), 20 * GIB)
    assert (peak(peaks, of("999")), peak(peaks, of("0"))) == (20, 18)
    for pixels in range(1000):
        peaks.took(of("c", pixels), whole(of()), (20 * 1000 + pixels) * GIB // 1000)
    assert peak(peaks, replace(of("c"), pixels=1000)) == pytest.approx(20.999)


def test_what_a_larger_picture_took_outlasts_a_smaller_one() -> None:
    """A small picture that took little says nothing of large ones; one that ran out early forgets nothing."""
    peaks = Peaks()
    large = of(pixels=4 * PIXELS)
    peaks.took(large, whole(large), 30 * GIB)
    peaks.took(of(), whole(of()), 20 * GIB)
    assert (peak(peaks, large), peak(peaks, of())) == (30, 20)
    peaks.ran_out(large, whole(large), 20 * GIB)
    assert peak(peaks, large) == 30


def test_way_that_had_less_than_its_estimate_says_nothing_of_others() -> None:
    """What ran out with less than it should need leaves the other ways as they were."""
    peaks, needed = Peaks(), of(tile=2 * GIB)
    peaks.ran_out(needed, whole(needed), 16 * GIB)
    assert peak(peaks, needed, tiled=True) == 17
