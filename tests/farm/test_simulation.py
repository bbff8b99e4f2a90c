"""The simulation in small; the long one is ``make farm``."""

from __future__ import annotations

from pathlib import Path

from tests.farm import faults, people
from tests.farm.farm import Size
from tests.farm.simulation import is_clean, one_desk, table


def test_one_desk_loses_nothing_while_everything_fails(tmp_path: Path) -> None:
    """A studio on SQLite is killed, stopped and frozen, sessions drop: each job ends once, and in turn."""
    size = Size(seed=1, jobs=200, people=12, workers=20, processes=1, faults=5, makes_s=0.2)
    outcome = one_desk(tmp_path / "desk", size)
    assert is_clean(outcome), table("one desk", outcome)
    assert outcome.faults.total() == 5
    assert len(outcome.verdict.waits) == 200
    assert len(outcome.book.account.delivered) + len(outcome.book.account.hopeless) == 200


def test_farm_follows_the_same_script_for_the_same_seed() -> None:
    """A run that found something can be run again: the same people, jobs and faults."""
    assert people.plan(7, 500, 50) == people.plan(7, 500, 50) != people.plan(8, 500, 50)
    first = faults.script(7, 500, 40, list(faults.WEIGHTS))
    assert first == faults.script(7, 500, 40, list(faults.WEIGHTS))
    assert {fault.kind for fault in first} == set(faults.WEIGHTS)
