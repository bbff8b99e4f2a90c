"""When a worker should take no jobs for a while, judged by how its last ones ended (a circuit breaker).

Pure rules: told what became of jobs and what the device said when it was tried out, asked whether an offer is
to be refused. Only failures that are this box's, or that may be, are told here. It counts them twice:

* of one model, in a row: at :data:`FAILURES` jobs of that model are held back. It may be the model's host, or
  its weights, so other models go on.
* of the box, in a row, whatever the model: at as many, of more than one model, all jobs are held back.

Where all of them failed while something was fetched, only jobs are held back for which something has to be.
What is held back is so for a pause, which doubles each time from :data:`FIRST_PAUSE_S` to
:data:`LONGEST_PAUSE_S`, and until the device has passed a try. Then a job is let through as every other, and
its end decides: a picture ends it all, a failure is followed by the next pause.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

FAILURES = 3
"""So many in a row, that this box had and another might not have, are no accident."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 900.0
"""Long enough for a network to come back; short enough that a box that was mended is not missed for long."""

FAILED_TRIES = 3
"""A device that fails so many tries in a row may be well again for a new process, but not for this one."""

_REMEMBERED_MODELS = 100


class Refusal(NamedTuple):
    """Why an offer is refused; ``is_for_now`` where it should come here again, for nobody may be better."""

    reason: str
    is_for_now: bool


class Hold(NamedTuple):
    """What is held back: a model, or (``None``) all, or all that has to be fetched; until ``until``."""

    model: str | None
    failures: int
    reason: str
    until: float
    only_fetching: bool


@dataclass
class _Run:
    """Failures in a row."""

    failures: int = 0
    reason: str = ""
    model: str = ""
    is_mixed: bool = False
    """Whether they were of several models."""
    only_fetching: bool = True
    others_work: bool = False
    """Whether another model was made meanwhile."""
    is_held: bool = False
    pause_s: float = 0.0
    until: float = 0.0

    def fail(self, model: str, reason: str, *, fetching: bool) -> None:
        self.is_mixed = self.is_mixed or (self.failures > 0 and model != self.model)
        self.failures += 1
        self.model, self.reason = model, reason
        self.only_fetching = self.only_fetching and fetching

    def hold(self, now: float) -> None:
        self.is_held = True
        self.pause_s = min(2 * self.pause_s or FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self.until = now + self.pause_s


class Breaker:
    """The rule, for one device. Not safe for several threads.

    Args:
        clock: seconds that do not jump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._box = _Run()
        self._models: OrderedDict[str, _Run] = OrderedDict()
        self._made_last: str | None = None
        self._made_several = False
        self.failed_tries = 0
        """How often in a row the device failed its try."""

    # --- what happened ---

    def made(self, model: str) -> None:
        """A picture was made: the box works, and so does ``model``."""
        self._models.pop(model, None)
        for run in self._models.values():
            run.others_work = True
        self._made_several = self._made_several or self._made_last not in {None, model}
        self._made_last = model
        if not self._box.is_held:  # a job for which nothing was fetched says nothing of those that wait
            self._box = _Run()

    def failed(self, model: str, reason: str, *, fetching: bool) -> None:
        """A job failed by what may be this box's fault.

        Args:
            fetching: whether it came no further than the fetching of its files.
        """
        run = self._models.setdefault(model, _Run())
        self._models.move_to_end(model)
        if len(self._models) > _REMEMBERED_MODELS:
            self._models.popitem(last=False)
        run.fail(model, reason, fetching=fetching)
        self._box.fail(model, reason, fetching=fetching)
        now = self._clock()
        if run.failures >= FAILURES:
            run.hold(now)
        if self._box.failures >= FAILURES and self._box.is_mixed:
            self._box.hold(now)

    def crashed(self, times: int) -> None:
        """So many processes in a row, up to this one, ended in the middle of a job."""
        box = self._box
        box.failures, box.reason = times, "the process ended in the middle of a job"
        box.is_mixed, box.only_fetching = True, False
        for _ in range(FAILURES, times + 1):
            box.hold(self._clock())

    def tried(self, problem: str) -> None:
        """The device was tried out; ``problem`` is empty where it works."""
        self.failed_tries = self.failed_tries + 1 if problem else 0
        if problem:
            self._box.reason, self._box.only_fetching = problem, False
            self._box.hold(self._clock())

    def lift(self) -> None:
        """Let jobs through again whose pause is over."""
        now = self._clock()
        for run in self._runs():
            if run.until <= now:
                run.is_held = False

    # --- what follows ---

    def refusal(self, model: str, *, fetches: bool) -> Refusal | None:
        """Why a job of ``model`` should not be taken now, or ``None``.

        Args:
            fetches: whether something has to be fetched for it.
        """
        box = self._box
        if box.is_held and (fetches or not box.only_fetching):
            return Refusal(f"the last {box.failures} jobs failed here: {box.reason}", is_for_now=True)
        run = self._models.get(model)
        if run is None or not run.is_held or (run.only_fetching and not fetches):
            return None
        # Where this box works and that model does not, other workers, and jobs of other models that wait
        # behind this one, are better served by a plain no.
        works = run.others_work or (run.only_fetching and self._has_made_another(model))
        reason = f"the last {run.failures} jobs of this model failed here: {run.reason}"
        return Refusal(reason, is_for_now=not works)

    def wait_s(self) -> float | None:
        """How long until the next pause is over; ``None`` where there is none."""
        ends = [run.until for run in self._runs() if run.is_held]
        return max(0.0, min(ends) - self._clock()) if ends else None

    def needs_try(self) -> bool:
        """Whether pauses that are over want the device tried out: not where only fetching failed."""
        now = self._clock()
        return any(run.is_held and run.until <= now and not run.only_fetching for run in self._runs())

    def holds(self) -> tuple[Hold, ...]:
        """What is held back now, the box first."""
        held = [(None, self._box), *self._models.items()]
        return tuple(
            Hold(model, run.failures, run.reason, run.until, run.only_fetching)
            for model, run in held
            if run.is_held
        )

    @property
    def failures(self) -> int:
        """How many jobs in a row failed, whatever their models."""
        return self._box.failures

    @property
    def reason(self) -> str:
        """Why the last of those did."""
        return self._box.reason

    def _has_made_another(self, model: str) -> bool:
        return self._made_several or self._made_last not in {None, model}

    def _runs(self) -> Iterator[_Run]:
        yield self._box
        yield from self._models.values()
