"""The rule of turns: fewer switches of models, and nobody starves."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from studio_worker.work.order import LONGEST_WAIT_S, Waiting, next_of

MODELS = st.sampled_from(["sdxl", "flux", "z-image"])


def test_model_that_is_loaded_goes_first() -> None:
    """Of two jobs that are ready, the one whose model is on the device is made first."""
    waiting = [Waiting("flux", 0.0), Waiting("sdxl", 1.0)]
    assert next_of(waiting, {"sdxl"}, 2.0) == 1
    assert next_of(waiting, {"flux", "sdxl"}, 2.0) == 0
    assert next_of(waiting, set(), 2.0) == 0


def test_job_goes_before_letting_models_go() -> None:
    """At a pause models leave after the jobs that are in hand, not between them."""
    assert next_of([Waiting(None, 0.0), Waiting("sdxl", 1.0)], set(), 2.0) == 1
    assert next_of([Waiting(None, 0.0)], {"sdxl"}, 2.0) == 0


def test_who_has_waited_too_long_goes_first() -> None:
    """A job of another model waits no longer than a stated time for those of the loaded one."""
    waiting = [Waiting("flux", 0.0), Waiting("sdxl", 1.0)]
    assert next_of(waiting, {"sdxl"}, LONGEST_WAIT_S) == 1
    assert next_of(waiting, {"sdxl"}, LONGEST_WAIT_S + 0.1) == 0


@given(
    lanes=st.lists(st.lists(st.tuples(MODELS, st.floats(0.1, 30.0)), max_size=40), min_size=1, max_size=8),
    gap_s=st.floats(0.0, 5.0),
)
def test_nobody_starves_and_the_device_never_waits(
    lanes: list[list[tuple[str, float]]], gap_s: float
) -> None:
    """However jobs of several models come, each has its turn at most one round of the lanes after the limit,
    and where somebody waits somebody has a turn.
    """
    now, loaded = 0.0, ""
    left = [list(jobs) for jobs in lanes]
    ready_at = [0.0] * len(lanes)
    while any(left):
        waiting = sorted(
            (ready_at[lane], lane) for lane in range(len(lanes)) if left[lane] and ready_at[lane] <= now
        )
        if not waiting:
            now = min(at for lane, at in enumerate(ready_at) if left[lane])
            continue
        place = next_of([Waiting(left[lane][0][0], since) for since, lane in waiting], {loaded}, now)
        since, lane = waiting[place]
        longest_s = max(seconds for _, seconds in itertools.chain(*lanes))
        assert now - since <= LONGEST_WAIT_S + len(lanes) * longest_s
        loaded, took_s = left[lane].pop(0)
        now += took_s
        ready_at[lane] = now + gap_s
