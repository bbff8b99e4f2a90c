"""Whether the farm kept its promises, by what the database saw and what people and workers were told.

*Lost*: a job that was taken is gone; ended neither done nor failed for a reason that is known; is done
without its picture. *Twice*: a job was done twice, delivered twice, or held by two workers at once. What
counts against turns and priorities says :mod:`fairness`.
"""

from __future__ import annotations

import collections
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.farm.fairness import Offline, broken_turns
from tests.farm.history import Event, History, Job


@dataclass
class Account:
    """What people were told of their jobs, and workers of their pictures.

    ``taken`` are jobs whose id somebody has. ``unanswered`` counts submissions whose answer was lost: they
    may be jobs or not. ``delivered`` counts pictures that were answered with 2xx, by job; ``refused`` those
    turned away for good; ``kept`` are jobs whose picture a worker still has. ``hopeless`` are jobs of which
    a worker said that no other try can mend them.
    """

    taken: set[str] = field(default_factory=set)
    unanswered: int = 0
    delivered: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    kept: set[str] = field(default_factory=set)
    hopeless: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Verdict:
    """What was broken, one line each; nothing where all are empty. Waits are seconds from queue to offer."""

    lost: list[str]
    twice: list[str]
    unfair: list[str]
    overtaken: list[str]
    waits: Mapping[str, float]

    @property
    def is_clean(self) -> bool:
        """Whether every promise was kept."""
        return not (self.lost or self.twice or self.unfair or self.overtaken)


def judge(
    history: History, account: Account, stored: Collection[str] | None = None, offline: Offline | None = None
) -> Verdict:
    """The verdict on one run.

    Args:
        stored: jobs whose picture lies in the picture store, whole; ``None`` where nobody looked.
        offline: when which worker could not have been offered anything.
    """
    turns = broken_turns(history, offline)
    return Verdict(
        lost=_lost(history, account, stored),
        twice=_twice(history, account) + turns.held_twice,
        unfair=turns.unfair,
        overtaken=turns.overtaken,
        waits=_waits(history.events),
    )


EVIDENCE = "evidence.pickle"


def judge_and_keep(
    folder: Path, history: History, account: Account, stored: Collection[str] | None, offline: Offline
) -> Verdict:
    """The verdict; what it was found by is kept where it is not clean, and :func:`judge_again` takes it."""
    verdict = judge(history, account, stored, offline)
    if not verdict.is_clean:
        (folder / EVIDENCE).write_bytes(pickle.dumps((history, account, stored, dict(offline))))
    return verdict


def judge_again(folder: Path) -> Verdict:
    """The verdict on a run whose evidence lies in this folder."""
    return judge(*pickle.loads((folder / EVIDENCE).read_bytes()))  # noqa: S301  (written above)


def _lost(history: History, account: Account, stored: Collection[str] | None) -> list[str]:
    known = {job.job_id: job for job in history.jobs}
    lost = [f"job {job_id} was taken and is gone" for job_id in sorted(account.taken - known.keys())]
    extra = len(known.keys() - account.taken)
    if extra > account.unanswered:
        lost.append(f"{extra} jobs are nobody's; {account.unanswered} answers were lost")
    for job in history.jobs:
        if job.status == "done":
            if job.results != 1 or (stored is not None and job.job_id not in stored):
                lost.append(f"job {job.job_id} is done and its picture is not there")
        elif job.status != "failed" or not _is_known_failure(job, account):
            lost.append(f"job {job.job_id} ended {job.status}: {job.reason}")
        elif account.delivered[job.job_id]:
            lost.append(f"job {job.job_id} has failed, and its picture was taken")
    lost += [f"the picture of job {job_id} is still with a worker" for job_id in sorted(account.kept)]
    return lost


def _is_known_failure(job: Job, account: Account) -> bool:
    return job.job_id in account.hopeless or bool(re.match("no worker can do it", job.reason or ""))


def _twice(history: History, account: Account) -> list[str]:
    done = collections.Counter(event.job_id for event in history.events if event.became == "done")
    twice = [f"job {job_id} became done {count} times" for job_id, count in done.items() if count > 1]
    twice += [
        f"job {job.job_id} has {job.completions} completions and {job.results} results"
        for job in history.jobs
        if job.completions > 1 or job.results > 1
    ]
    # A picture whose answer was lost is sent again; only one of these is told that it was taken.
    told = account.delivered.items()
    return twice + [f"job {job_id} was delivered {count} times" for job_id, count in told if count > 1]


def _waits(events: Collection[Event]) -> dict[str, float]:
    came: dict[str, float] = {}
    waits: dict[str, float] = {}
    for event in events:
        if event.became == "queued":
            came.setdefault(event.job_id, event.committed)
        elif event.became == "offered" and event.job_id not in waits and event.job_id in came:
            waits[event.job_id] = max(0.0, event.committed - came[event.job_id])
    return waits
