"""Whose turn is next at the device, where several lanes are ready: a rule without threads or a clock.

The one whose model is on the device, since to load another takes longer than most pictures; unless another
has waited too long. Work for no model (to let models go, at a pause) comes after jobs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

LONGEST_WAIT_S = 60.0
"""Who has waited so long is next, whatever is loaded: about as long as a large model takes to load."""


class Waiting(NamedTuple):
    """Who waits for the device, for a picture of ``model`` or without one; ``since`` in monotonic seconds."""

    model: str | None
    since: float


def next_of(waiting: Sequence[Waiting], loaded: Collection[str], now: float) -> int:
    """Which of ``waiting``, oldest first and not empty, has the next turn.

    Args:
        loaded: the models that are on the device.
    """
    if now - waiting[0].since > LONGEST_WAIT_S:
        return 0
    at_hand = (place for place, each in enumerate(waiting) if each.model in loaded)
    of_jobs = (place for place, each in enumerate(waiting) if each.model is not None)
    return next(at_hand, next(of_jobs, 0))
