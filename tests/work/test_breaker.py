"""When a box takes no jobs for a while: the rule alone, with a clock that a test turns."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio_worker.work.breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker, Refusal


class Box:
    """A box to which a studio offers jobs, one at a time, as long as a test likes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.breaker = Breaker(lambda: self.now)
        self.begun: list[tuple[float, str]] = []

    def offer(self, model: str, end: str, *, fetches: bool = False) -> Refusal | None:
        """``end`` is what becomes of the job where it is taken: made, failed or not fetched."""
        if refusal := self.breaker.refusal(model, fetches=fetches):
            return refusal
        self.begun.append((self.now, model))
        if end == "made":
            self.breaker.made(model)
        else:
            self.breaker.failed(model, "it failed", fetching=end == "not fetched")
        return None

    def pass_time(self, seconds: float, problem: str = "") -> None:
        """As the service does: wait for the next pause's end, try the device where that is wanted, lift."""
        until = self.now + seconds
        while (wait_s := self.breaker.wait_s()) is not None and self.now + wait_s <= until:
            self.now += wait_s
            if self.breaker.needs_try():
                self.breaker.tried(problem)
            self.breaker.lift()
        self.now = until


@pytest.fixture
def box() -> Box:
    return Box()


def test_one_model_that_fails_is_held_back_and_comes_again_by_itself(box: Box) -> None:
    """After three failures in a row offers of the model are answered "not now" until its pause is over; the
    first picture ends it all.
    """
    for _ in range(FAILURES):
        assert box.offer("a", "failed") is None
    refusal = box.offer("a", "made")
    assert refusal == Refusal("the last 3 jobs of this model failed here: it failed", is_for_now=True)
    box.pass_time(FIRST_PAUSE_S - 1)
    assert box.offer("a", "made") is not None
    box.pass_time(1)
    assert box.offer("a", "made") is None
    for _ in range(FAILURES - 1):
        assert box.offer("a", "failed") is None
    assert box.breaker.holds() == ()


def test_pauses_double_up_to_the_longest(box: Box) -> None:
    """A box that is never mended is asked more and more seldom, and for ever."""
    for _ in range(200_000):
        box.offer("a", "failed")
        box.pass_time(1)
    times = [at for at, _ in box.begun][FAILURES - 1 :]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert pauses[:6] == [30, 60, 120, 240, 480, 900]
    assert set(pauses[5:]) == {LONGEST_PAUSE_S}


def test_failures_of_several_models_are_the_boxs(box: Box) -> None:
    """Failures in a row of more than one model hold everything back, models never tried here included."""
    for model in ("a", "b", "a"):
        assert box.offer(model, "failed") is None
    assert box.offer("never tried", "made") == Refusal(
        "the last 3 jobs failed here: it failed", is_for_now=True
    )
    box.pass_time(FIRST_PAUSE_S)
    assert box.offer("never tried", "made") is None
    assert box.offer("a", "made") is None


def test_box_without_a_network_goes_on_with_what_it_has(box: Box) -> None:
    """Where jobs of several models failed while something was fetched, those that need nothing are taken."""
    for model in "abc":
        assert box.offer(model, "not fetched", fetches=True) is None
    assert box.offer("d", "made", fetches=True) is not None
    assert box.offer("here", "made") is None
    assert box.offer("d", "made", fetches=True) is not None, "a file that is here says nothing of the network"
    assert not box.breaker.needs_try()
    box.pass_time(FIRST_PAUSE_S)
    assert box.offer("d", "made", fetches=True) is None


def test_model_that_fails_beside_others_that_work_is_left_to_other_workers(box: Box) -> None:
    """Where the box makes other pictures meanwhile, a model that fails is refused for good, so that the jobs
    behind it come.
    """
    box.offer("good", "made")
    for end in ("not fetched", "not fetched", "not fetched"):
        box.offer("bad", end, fetches=True)
    refusal = box.offer("bad", "made", fetches=True)
    assert refusal is not None
    assert not refusal.is_for_now


@pytest.mark.parametrize("works_meanwhile", [True, False])
def test_what_worked_before_says_nothing_of_a_device_now(box: Box, works_meanwhile: bool) -> None:
    """A model that fails in the making may be the device's fault, unless others are made meanwhile."""
    box.offer("good", "made")
    for _ in range(FAILURES):
        assert box.offer("odd", "failed") is None
        if works_meanwhile:
            assert box.offer("good", "made") is None
    refusal = box.offer("odd", "made")
    assert refusal is not None
    assert refusal.is_for_now != works_meanwhile


def test_device_that_fails_its_try_holds_everything_back(box: Box) -> None:
    """When the pause is over and the device does not pass, nothing is taken, and the next pause is longer."""
    for _ in range(FAILURES):
        box.offer("a", "failed")
    box.pass_time(FIRST_PAUSE_S, problem="it computes wrong numbers")
    assert box.breaker.failed_tries == 1
    refusal = box.offer("b", "made")
    assert refusal is not None
    assert "it computes wrong numbers" in refusal.reason
    box.pass_time(FIRST_PAUSE_S)
    assert box.breaker.failed_tries == 0
    assert box.offer("b", "made") is None


@pytest.mark.parametrize(("times", "pause_s"), [(1, None), (2, None), (3, 30), (4, 60), (40, 900)])
def test_processes_that_died_in_jobs_count(box: Box, times: int, pause_s: float | None) -> None:
    """A box whose process dies with job after job waits longer after each start, and a picture ends that."""
    box.breaker.crashed(times)
    assert box.breaker.wait_s() == pause_s
    if pause_s is not None:
        box.pass_time(pause_s)
    assert box.offer("a", "made") is None
    for _ in range(FAILURES - 1):
        assert box.offer("b", "failed") is None
    assert box.breaker.holds() == ()


EVENTS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.sampled_from(["made", "failed", "not fetched"]),
        st.booleans(),
        st.floats(0, 2000),
        st.sampled_from(["", "", "", "broken"]),
    ),
    max_size=60,
)


@given(EVENTS)
def test_sick_box_burns_few_attempts_and_a_mended_one_works(
    events: list[tuple[str, str, bool, float, str]],
) -> None:
    """Whatever happened before: a box on which every job fails begins at most three of each model and one
    more of each at every pause's end, and a box that is mended takes every model within the longest pause.
    """
    box = Box()
    for model, end, fetches, seconds, problem in events:
        box.offer(model, end, fetches=fetches or end == "not fetched")
        box.pass_time(seconds, problem)
    box.begun.clear()
    for _ in range(400):
        for model in "abcd":
            box.offer(model, "failed")
        box.pass_time(1)
    assert all(sum(began == model for _, began in box.begun) <= FAILURES + 4 for model in "abcd")
    box.pass_time(LONGEST_PAUSE_S)
    for model in "abcd":
        assert box.offer(model, "made") is None
    assert box.breaker.holds() == ()


def test_studio_that_invents_models_does_not_fill_the_memory(box: Box) -> None:
    """Models that were never made are forgotten, the one that failed longest ago first."""
    for number in range(1000):
        box.breaker.failed(f"model {number}", "it failed", fetching=False)
    assert len(box.breaker._models) <= 100
