"""Who gets which job, and when, as one pure function over the jobs that wait.

In this order:

- *Priority*: the highest that has a job for the worker that asks.
- *Round robin*: within a priority those who queue take turns, each with the oldest of its own jobs. Whoever
  was served longest ago is next, so one person's ten thousand jobs do not hold up another's one.
- *Affinity*: a worker goes on with the model that it made last, and a job is left to a worker that has its
  model loaded; but whoever's turn it is waits for that once, and not longer than :class:`Patience` says. A
  worker is waited for by one job at a time: where more of a model wait than workers have it loaded, others
  load it, too.
- *Rejections*: a job that a worker rejected without a code goes to the others, and comes back to this one
  only when nobody else is left, after a while: a disk may have room again.

Where nobody names a priority or a submitter, that is: oldest first. No clock, no database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from studio_worker.local_studio.rules import Rejection

Turns = Mapping[tuple[int, str], int]
"""By priority and submitter, when its last turn was: a number that grows with every turn."""


@dataclass(frozen=True)
class Patience:
    """How long something better is waited for.

    ``affinity_s`` is about what it takes to load a model from disk: who waits no longer than the thing waited
    for would save, never does worse than twice the best.
    """

    affinity_s: float = 20.0
    ask_again_s: float = 120.0


PATIENCE = Patience()


@dataclass(frozen=True)
class Waiting:
    """A queued job as far as its turn depends on it. ``number`` grows in the order of coming.

    ``passed_at`` says since when it is its turn while workers with other models loaded pass it over.
    ``alike`` is how many it stands for: itself, and those behind it of its priority, submitter and model.
    """

    job_id: str
    number: int
    model: str
    priority: int = 0
    submitter: str = ""
    passed_at: float | None = None
    rejections: Mapping[str, Rejection] = field(default_factory=dict)
    alike: int = 1


@dataclass(frozen=True)
class Crew:
    """Who could take a job now (connected, not paused), and by worker the model of its last result."""

    ready: frozenset[str] = frozenset()
    last_made: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What a worker is offered, if anything. ``passed`` are jobs whose turn it was for the first time."""

    job_id: str | None
    passed: tuple[str, ...] = ()


def next_for(
    worker_id: str, waiting: Iterable[Waiting], crew: Crew, turns: Turns, now: float, patience: Patience
) -> Choice:
    """The job that this worker is offered.

    Args:
        waiting: all queued jobs, in any order; of each priority, submitter and model the oldest of those
            that were not rejected may stand for all of them.
    """
    loaded = crew.last_made.get(worker_id)
    keepers = _keepers(worker_id, crew)
    passed: list[str] = []
    allowed = [job for job in waiting if _may_have(worker_id, job, crew, now, patience)]
    for line in _lines(allowed, turns):
        job = _of(line, loaded, keepers, now, patience)
        if job is not line[0] and line[0].passed_at is None:
            passed.append(line[0].job_id)
        if job is not None:
            return Choice(job.job_id, tuple(passed))
    # What is left is waited for by a worker that has it loaded; a lower priority was not held up by that.
    return Choice(None, tuple(passed))


def _may_have(worker_id: str, job: Waiting, crew: Crew, now: float, patience: Patience) -> bool:
    own = job.rejections.get(worker_id)
    if own is None:
        return True
    is_anybody_left = any(other not in job.rejections for other in crew.ready - {worker_id})
    return not is_anybody_left and now - own.at >= patience.ask_again_s


def _lines(jobs: Iterable[Waiting], turns: Turns) -> Iterator[Sequence[Waiting]]:
    """The jobs of each priority, the highest first, in the order of turns."""
    for priority, line in groupby(sorted(jobs, key=lambda job: -job.priority), lambda job: job.priority):
        jobs_of_line = sorted(line, key=lambda job: job.number)
        first = {job.submitter: job.number for job in reversed(jobs_of_line)}
        yield sorted(
            jobs_of_line,
            key=lambda job: (turns.get((priority, job.submitter), 0), first[job.submitter], job.number),
        )


def _of(
    line: Sequence[Waiting],
    loaded: str | None,
    keepers: Mapping[str, set[str]],
    now: float,
    patience: Patience,
) -> Waiting | None:
    first = line[0]
    if first.passed_at is not None and now - first.passed_at >= patience.affinity_s:
        return first
    own = next((job for job in line if job.model == loaded), None)
    if own is not None:
        return own
    alike: Counter[str] = Counter()
    for job in line:
        alike[job.model] += job.alike
    return next((job for job in line if not _is_kept(job, keepers, alike[job.model])), None)


def _is_kept(job: Waiting, keepers: Mapping[str, set[str]], alike: int) -> bool:
    """Whether another worker, which has the model loaded, can be waited for."""
    return len(keepers.get(job.model, set()) - job.rejections.keys()) >= alike


def _keepers(worker_id: str, crew: Crew) -> dict[str, set[str]]:
    """Who else has which model loaded, and could take a job."""
    keepers: dict[str, set[str]] = {}
    for other, model in crew.last_made.items():
        if other != worker_id and other in crew.ready:
            keepers.setdefault(model, set()).add(other)
    return keepers
