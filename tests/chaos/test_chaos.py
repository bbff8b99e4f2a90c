"""The short form of the soak; the long one, with torch and hundreds of faults, is ``make chaos``."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.soak import WEIGHTS, script, soak

FAULTS = 17


def test_soak_under_chaos_loses_nothing_and_makes_nothing_twice(tmp_path: Path) -> None:
    """Whatever breaks between worker and studio, or kills one of them: every job is done exactly once or
    failed for its own reason, no picture is lost or made while the outbox holds it, no state is damaged.
    """
    account = soak(tmp_path, seed=1, jobs=30, faults=FAULTS, synthetic=True)
    assert account.wrong == []
    assert sum(account.faults.values()) == FAULTS
    assert account.done + sum(account.failed.values()) == 30


def test_soak_of_several_lanes_loses_nothing_and_makes_nothing_twice(tmp_path: Path) -> None:
    """The same holds where three workers of one box take the jobs, and a job goes from one to the other."""
    account = soak(tmp_path, seed=2, jobs=30, faults=FAULTS, synthetic=True, lanes=3)
    assert account.wrong == []
    assert account.done + sum(account.failed.values()) == 30


def test_soak_follows_the_same_script_for_the_same_seed() -> None:
    """A soak that found something can be run again; every kind of fault is in a script of some length."""
    first = script(7, 500, 110, 2)
    assert first == script(7, 500, 110, 2)
    assert first != script(8, 500, 110, 2)
    assert len(first) == 110
    assert {fault.kind for fault in first} == {*WEIGHTS, "stall"}
