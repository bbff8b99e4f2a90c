"""Studio processes that wake one another over PostgreSQL."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
import sqlalchemy

from studio_worker.local_studio.wake import CHANGES_S, CHANNEL, Hint, Listening
from tests.farm.postgres import Cluster

LIMIT_S = 20.0
LOOK = Hint("look")


class Process:
    """One that listens; what it has heard comes out in order."""

    def __init__(self, url: str) -> None:
        self._heard: queue.SimpleQueue[Hint] = queue.SimpleQueue()
        self.wake = Listening(sqlalchemy.make_url(url).set(drivername="postgresql+psycopg"))

    def __enter__(self) -> Process:
        self.wake.start(self._heard.put)
        assert self.hears() == LOOK
        return self

    def __exit__(self, *_: object) -> None:
        self.wake.stop()

    def hears(self) -> Hint:
        return self._heard.get(timeout=LIMIT_S)

    def hears_until(self, wanted: Hint) -> list[Hint]:
        heard = [self.hears()]
        while heard[-1] != wanted:
            heard.append(self.hears())
        return heard


@pytest.fixture
def pair(database_url: str) -> Iterator[tuple[Process, Process]]:
    with Process(database_url) as north, Process(database_url) as south:
        yield north, south


def test_wake_reaches_the_others_in_order(pair: tuple[Process, Process]) -> None:
    """What one process tells, every other hears, in order; it does not hear itself."""
    north, south = pair
    hints = [Hint("end", "anna"), Hint("offer", "bert"), Hint("offer_others", "anna")]
    for hint in hints:
        north.wake.tell(hint)
    assert [south.hears() for _ in hints] == hints
    south.wake.tell(Hint("offer", "carl"))
    assert north.hears() == Hint("offer", "carl")


def test_wake_tells_of_many_changes_few_times(pair: tuple[Process, Process]) -> None:
    """A thousand changes at once are told a few times at most, and the last of them is told."""
    north, south = pair
    began = time.monotonic()
    for _ in range(1000):
        north.wake.tell(Hint("change"))
    assert south.hears() == Hint("change")
    north.wake.tell(Hint("change"))
    assert south.hears() == Hint("change")
    north.wake.tell(Hint("end", "anna"))
    more = south.hears_until(Hint("end", "anna"))[:-1]
    assert 2 + len(more) <= 1 + (time.monotonic() - began) / CHANGES_S


@pytest.mark.parametrize("break_it", [Cluster.stop, Cluster.kill], ids=["stopped", "crashed"])
def test_wake_looks_at_everything_after_a_restart_of_the_database(
    pair: tuple[Process, Process], postgres: Cluster, break_it: Callable[[Cluster], None]
) -> None:
    """Whoever lost its connection looks at everything once it is back, and then says what it had to say."""
    north, south = pair
    break_it(postgres)
    north.wake.tell(Hint("end", "anna"))
    postgres.start()
    south.hears_until(LOOK)
    north.hears_until(LOOK)
    north.wake.tell(Hint("offer", "bert"))
    south.hears_until(Hint("offer", "bert"))


def test_wake_that_is_stopped_says_what_is_left(database_url: str) -> None:
    """What was told just before the end is said."""
    with Process(database_url) as south:
        north = Process(database_url)
        with north:
            for hint in (Hint("change"), Hint("change"), Hint("end", "anna")):
                north.wake.tell(hint)
        south.hears_until(Hint("end", "anna"))


def test_wake_starts_before_its_database(postgres: Cluster, database_url: str) -> None:
    """A process that cannot reach the database yet keeps trying, and looks at everything once it can."""
    postgres.stop()
    with started(database_url) as process:
        postgres.start()
        assert process.hears() == LOOK


def test_wake_takes_what_a_later_version_says_for_a_change(database_url: str) -> None:
    """An unknown hint changes something, and breaks nothing."""
    with Process(database_url) as process, psycopg.connect(database_url, autocommit=True) as later:
        later.execute(f"NOTIFY {CHANNEL}, 'brew:coffee'")
        assert process.hears().kind == "change"


@contextmanager
def started(url: str) -> Iterator[Process]:
    process = Process(url)
    process.wake.start(process._heard.put)
    try:
        yield process
    finally:
        process.wake.stop()
