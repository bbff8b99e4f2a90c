"""The desk between the session's thread and the worker's."""

from __future__ import annotations

import pytest

from studio_worker.work.desk import Desk, Desks, Hands
from tests.lab.worker import job


def test_pause_is_told_once_to_who_waits_for_a_job() -> None:
    """Whoever waits for a job rests once at each pause, after the job that was put before it."""
    desk = Desk()
    rests: list[str] = []
    desk.put(job("a"))
    desk.pause()
    desk.pause()
    assert desk.take(lambda: rests.append("before a")) == job("a")
    desk.put(job("b"))
    assert desk.take(lambda: rests.append("before b")) == job("b")
    assert rests == ["before b"]


def test_pause_that_is_over_is_not_told() -> None:
    """A pause that ended before anybody waited for a job costs nothing."""
    desk = Desk()
    desk.pause()
    desk.resume()
    desk.put(job("a"))
    assert desk.take(lambda: pytest.fail("rested")) == job("a")


def test_closed_desk_ends_the_wait_of_a_paused_worker() -> None:
    """A service that is stopped while it is paused ends."""
    desk = Desk()
    rests: list[int] = []
    desk.pause()
    desk.close()
    assert desk.take(lambda: rests.append(1)) is None
    assert rests == [1]


def test_rest_comes_after_the_job_in_hand_and_is_told() -> None:
    """Whoever needs the device waits for the job that was put before, and knows when the models have left."""
    desk = Desk()
    rests: list[str] = []
    desk.put(job("a"))
    rested = desk.rest()
    assert desk.take(lambda: rests.append("before a")) == job("a")
    assert not rested.is_set()
    desk.put(job("b"))
    assert desk.take(lambda: rests.append("before b")) == job("b")
    assert rested.is_set()
    assert rests == ["before b"]


# --- the desks of all lanes ---


def test_job_is_in_hand_at_one_desk_alone() -> None:
    """A job that another lane has is not taken, and may be once it has ended there."""
    hands = Hands()
    first, second = Desk(hands), Desk(hands)
    assert first.put(job("a"))
    assert second.is_elsewhere("a")
    assert not first.is_elsewhere("a")
    assert not second.put(job("a"))
    assert second.current_job_id is None
    first.finished(job("a"))
    assert not second.is_elsewhere("a")
    assert second.put(job("a"))


def test_pause_and_rest_are_those_of_all_desks() -> None:
    """The operator pauses the box, and the device is free when every lane has rested; one whose lane has
    ended is not waited for.
    """
    first, second = Desk(), Desk()
    desks = Desks([first, second])
    desks.pause()
    assert first.is_paused
    assert second.is_paused
    desks.resume()
    second.close()
    rests = desks.rest()
    assert [rested.is_set() for rested in rests] == [False, True]
    first.put(job("a"))
    assert desks.current_job_ids == ["a"]
    assert not desks.is_idle()
    first.take(lambda: None)
    assert rests[0].is_set()
