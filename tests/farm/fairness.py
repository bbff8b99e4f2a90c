"""Whether each offer was the right one, from the history alone; it shares no code with the studio's rules.

A worker W was offered a job J of priority P. *Overtaken* counts where a job of a higher priority waited that
W may have (it has not rejected it), unless all of these wait for something better: none is of the model that
W has loaded, each is of one that as many other workers have loaded as jobs of it wait, and whoever's turn it
is among them has been passed over for less than :data:`PATIENCE_S`.

*Unfair* counts, among the jobs of P that W may have, in order of turns (whoever was served longest ago first,
each person's in the order of coming), where J

- is not the first, although the first has been passed over for :data:`PATIENCE_S` already; or
- is not the first of W's model, although there is one; or
- is not the first of a model that fewer other workers have loaded than jobs of it wait, where there is none
  of W's model.

So one person's thousand jobs never hold up another's one, except for a model that is loaded, and for 20 s.

Processes that choose at the same time cannot see each other's choice before it is committed, so an offer is
right if it was right by what was committed at any one moment between the begin and the end of its
transaction. A commit bears a time a little before others see it, and two are not always seen in the order of
these times; so an offer is right, too, if it was right without one step of the last 50 ms, though later ones
count. No offer is such a step: these are made one at a time. A worker counts as one that a job may wait for
unless it was away for the whole of the last minute.
"""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.farm.history import Event, History, Job

PATIENCE_S = 20.0
_SLACK_S = 1.0
"""The studio's clock and the database's are read at different moments of one step."""
_SEEN_LATE_S = 0.05
"""Between the time that a commit bears and the moment when others see it."""
_TURNS_KEPT = 1000
"""Whoever was not served for so many turns counts as new."""
_AWAY_S = 60.0

Offline = Mapping[str, Sequence[tuple[float, float]]]
"""By worker, the spans of time in which it had no session or was paused."""


@dataclass
class Broken:
    """What was not right, one line each."""

    unfair: list[str] = field(default_factory=list)
    overtaken: list[str] = field(default_factory=list)
    held_twice: list[str] = field(default_factory=list)


def broken_turns(history: History, offline: Offline | None = None) -> Broken:
    """All offers that were not right."""
    return _Check(history, offline or {}).run()


_ENOUGH = 200
"""So many offers that were not right are told: each costs a look at many moments."""

_Place = tuple[int, int, int]
"""A job that waits, where it stands: its submitter's last turn and first job, and its number.

It is the oldest of its submitter and model that the worker may have.
"""


_Step = tuple[Event, Callable[[], None]]
"""Something that happened, and what takes it back."""


class _Fault(NamedTuple):
    is_overtaken: bool
    text: str


def _is_seen_late(step: Event, moment: float) -> bool:
    """Whether this step may not have been seen at that moment."""
    return step.committed >= moment - _SEEN_LATE_S


def _may_be_missing(step: Event, seen: Sequence[Event]) -> bool:
    """Whether these later ones, the newest first, may have been seen without it."""
    is_followed = any(each.job_id == step.job_id for each in seen)
    return step.became != "offered" and not is_followed and _is_seen_late(step, seen[0].committed)


class _Check:
    def __init__(self, history: History, offline: Offline) -> None:
        self._events = history.events
        self._jobs: dict[str, Job] = {job.job_id: job for job in history.jobs}
        self._numbered = {job.number: job for job in history.jobs}
        self._offline = offline
        self._broken = Broken()
        # What everybody could see, after the events so far:
        self._waiting: dict[int, dict[str, dict[str, list[int]]]] = {}
        self._alike: collections.Counter[tuple[int, str]] = collections.Counter()  # by priority and model
        self._queued: set[str] = set()
        self._turn: dict[tuple[int, str], int] = {}
        self._served = 0
        self._loaded: dict[str, str] = {}
        self._makers: dict[str, set[str]] = collections.defaultdict(set)
        self._rejected: dict[str, set[str]] = collections.defaultdict(set)  # by job, the workers
        self._refusals: dict[str, set[int]] = collections.defaultdict(set)  # by worker, the jobs' numbers
        self._passed: dict[int, float] = {}

    def run(self) -> Broken:
        undone: collections.deque[_Step] = collections.deque(maxlen=500)
        for event in self._events:
            if event.job_id not in self._jobs:
                continue  # deleted; the verdict tells of it
            if event.became == "offered" and len(self._broken.unfair + self._broken.overtaken) < _ENOUGH:
                if event.job_id not in self._queued:
                    self._broken.held_twice.append(
                        f"job {event.job_id} was offered to {event.worker_id} while another worker held it"
                    )
                elif self._jobs[event.job_id].number not in self._refusals[event.worker_id]:
                    self._judge(event, undone)  # else it came back, because nobody else was left
            undone.append((event, self._apply(event)))
        return self._broken

    def _judge(self, event: Event, undone: Sequence[_Step]) -> None:
        fault = self._fault(event)
        if fault is not None and not self._was_right(event, undone):
            (self._broken.overtaken if fault.is_overtaken else self._broken.unfair).append(fault.text)

    def _was_right(self, event: Event, undone: Sequence[_Step]) -> bool:
        """Whether this offer was right at an earlier moment of its transaction, or without one late step."""
        new = list(itertools.takewhile(lambda step: _is_seen_late(step[0], event.began), reversed(undone)))
        if any(self._is_right(event, new[:count]) for count in range(1, len(new) + 1)):
            return True
        for late, (step, _) in enumerate(new):
            for count in range(late):
                seen = [each for each, _ in new[count:late]]
                if _may_be_missing(step, seen) and self._is_right(event, new[: late + 1], seen):
                    return True
        return False

    def _is_right(self, event: Event, back: Sequence[_Step], seen: Sequence[Event] = ()) -> bool:
        """Whether it was right before the steps ``back``, but for those ``seen``; the newest comes first."""
        for _, undo in back:
            undo()
        again = [self._apply(step) for step in reversed(seen)]
        is_right = event.job_id in self._queued and self._fault(event) is None
        for undo in reversed(again):
            undo()
        for step, _ in reversed(back):
            self._apply(step)
        return is_right

    # --- the history as it goes on -----------------------------------------------------------------

    def _apply(self, event: Event) -> Callable[[], None]:
        """Take this step; returns what takes it back."""
        job, worker_id = self._jobs[event.job_id], event.worker_id
        line, was_queued = (job.priority, job.submitter), event.job_id in self._queued
        turn, loaded = self._turn.get(line), self._loaded.get(worker_id)
        passed, rejected = self._passed.get(job.number), job.number in self._refusals[worker_id]

        def undo() -> None:
            self._put(job, is_queued=was_queued)
            if event.became == "offered":
                self._served -= 1
                self._turn[line] = turn or 0
                if passed is not None:
                    self._passed[job.number] = passed
            elif event.became == "done":
                self._load(worker_id, loaded)
            if event.is_rejected and not rejected:
                self._rejected[job.job_id].discard(worker_id)
                self._refusals[worker_id].discard(job.number)

        self._put(job, is_queued=event.became == "queued")
        if event.became == "offered":
            self._served += 1
            self._turn[line] = self._served
            self._passed.pop(job.number, None)
        elif event.became == "done":
            self._load(worker_id, job.model)
        if event.is_rejected:
            self._rejected[job.job_id].add(worker_id)
            self._refusals[worker_id].add(job.number)
        return undo

    def _put(self, job: Job, *, is_queued: bool) -> None:
        if is_queued == (job.job_id in self._queued):
            return
        models = self._waiting.setdefault(job.priority, {}).setdefault(job.submitter, {})
        numbers = models.setdefault(job.model, [])
        self._alike[job.priority, job.model] += 1 if is_queued else -1
        if is_queued:
            self._queued.add(job.job_id)
            bisect.insort(numbers, job.number)
            return
        self._queued.discard(job.job_id)
        numbers.remove(job.number)
        if not numbers:
            del models[job.model]
        if not models:
            del self._waiting[job.priority][job.submitter]

    def _load(self, worker_id: str, model: str | None) -> None:
        before = self._loaded.pop(worker_id, None)
        if before is not None:
            self._makers[before].discard(worker_id)
        if model is not None:
            self._loaded[worker_id] = model
            self._makers[model].add(worker_id)

    # --- one offer ---------------------------------------------------------------------------------

    def _fault(self, event: Event) -> _Fault | None:
        """What is wrong with this offer by what can be seen now; notes who was passed over if nothing is."""
        job = self._jobs[event.job_id]
        passed: list[int] = []
        for priority in sorted((each for each in self._waiting if each > job.priority), reverse=True):
            line = self._line(priority, event)
            if not line:
                continue
            if why := self._is_wanted(line, event):
                return _Fault(True, self._told(event, line[0], why))
            passed.append(line[0][2])
        line = self._line(job.priority, event)
        mine = next((place for place in line if place[2] == job.number), None)
        if mine is None:
            return _Fault(False, f"job {job.job_id} was offered before an older one of its person and model")
        if mine is not line[0]:
            if why := self._is_unfair(line, mine, event):
                return _Fault(False, self._told(event, line[0], why))
            passed.append(line[0][2])
        for number in passed:
            self._passed.setdefault(number, event.at)
        return None

    def _line(self, priority: int, event: Event) -> list[_Place]:
        places = []
        refused = self._refusals[event.worker_id]
        for submitter, models in self._waiting.get(priority, {}).items():
            served = self._turn.get((priority, submitter), 0)
            turn = served if served > self._served - _TURNS_KEPT else 0
            if refused:
                firsts = (next((n for n in numbers if n not in refused), None) for numbers in models.values())
                heads = [number for number in firsts if number is not None]
            else:
                heads = [numbers[0] for numbers in models.values()]
            if heads:
                first = min(heads)
                places += [(turn, first, number) for number in heads]
        return sorted(places)

    def _allowed_alike(self, job: Job, event: Event) -> int:
        """How many jobs of its priority and model this worker may have."""
        alike = self._alike[job.priority, job.model]
        for number in self._refusals[event.worker_id]:
            other = self._numbered[number]
            if (other.priority, other.model) == (job.priority, job.model) and other.job_id in self._queued:
                alike -= 1
        return alike

    def _is_wanted(self, line: Sequence[_Place], event: Event) -> str:
        """Why this worker should have had a job of this higher priority; empty where all wait rightly."""
        if self._is_out_of_patience(line[0], event):
            return "had been passed over for too long"
        for place in line:
            if self._model(place) == self._loaded.get(event.worker_id):
                return "and others of its priority waited, one of the worker's own model"
            if not self._is_waited_for(place, event):
                return "and others of its priority waited, one of a model that too few had loaded"
        return ""

    def _is_unfair(self, line: Sequence[_Place], mine: _Place, event: Event) -> str:
        if self._is_out_of_patience(line[0], event):
            return "had been passed over for too long"
        own = [place for place in line if self._model(place) == self._loaded.get(event.worker_id)]
        if own:
            return "" if own[0] is mine else "was first, and another was first of the worker's model"
        before = line[: line.index(mine)]
        if all(self._is_waited_for(place, event) for place in before):
            return ""
        return "was first, and one before it was of a model that too few had loaded"

    def _is_out_of_patience(self, place: _Place, event: Event) -> bool:
        passed_at = self._passed.get(place[2])
        return passed_at is not None and event.began - passed_at >= PATIENCE_S + _SLACK_S

    def _is_waited_for(self, place: _Place, event: Event) -> bool:
        job = self._numbered[place[2]]
        others = self._makers[job.model] - {event.worker_id} - self._rejected.get(job.job_id, set())
        alike = self._allowed_alike(job, event)
        return len(others) >= alike and sum(self._may_be_ready(each, event) for each in others) >= alike

    def _may_be_ready(self, worker_id: str, event: Event) -> bool:
        return not any(
            since <= event.began - _AWAY_S and event.at <= until
            for since, until in self._offline.get(worker_id, ())
        )

    def _model(self, place: _Place) -> str:
        return self._numbered[place[2]].model

    def _told(self, event: Event, first: _Place, why: str) -> str:
        job, other = self._jobs[event.job_id], self._numbered[first[2]]
        return (
            f"job {job.job_id} ({job.priority}, {job.submitter}, {job.model}) was offered to"
            f" {event.worker_id[:8]}, which has {self._loaded.get(event.worker_id)} loaded, while"
            f" {other.job_id} ({other.priority}, {other.submitter}, {other.model}) {why}"
        )
