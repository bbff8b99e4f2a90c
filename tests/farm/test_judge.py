"""The judge of the simulation: right histories pass, and each kind of wrong one is found."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from studio_worker.local_studio.rules import Rejection
from studio_worker.local_studio.turns import PATIENCE, Choice, Crew, Waiting, next_for
from tests.farm.fairness import PATIENCE_S
from tests.farm.history import Event, History, Job
from tests.farm.judge import Account, Verdict, judge, judge_again, judge_and_keep

WORKERS = [f"worker {number}" for number in range(6)]


@dataclass
class Played:
    """A history of a studio that has one process and follows its own rules, played by chance."""

    seed: int
    jobs: dict[str, Job] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._waiting: dict[str, Waiting] = {}
        self._held: dict[str, Waiting] = {}
        self._turns: dict[tuple[int, str], int] = {}
        self._loaded: dict[str, str] = {}

    def note(self, job_id: str, became: str, worker_id: str = "", *, is_rejected: bool = False) -> None:
        times = {"began": self.now, "at": self.now, "committed": self.now}
        self.events.append(Event(job_id, became, worker_id, is_rejected, **times))  # type: ignore[arg-type]

    def come(self) -> None:
        number = len(self.jobs) + 1
        waiting = Waiting(
            f"job {number}", number, self._chance.choice("AAB"), self._chance.choice([0, 0, 5]),
            self._chance.choice(["ann", "ann", "ann", "bob", "cleo"]),
        )  # fmt: skip
        self.jobs[waiting.job_id] = Job(
            waiting.job_id, number, waiting.model, waiting.priority, waiting.submitter, "queued"
        )
        self._waiting[waiting.job_id] = waiting
        self.note(waiting.job_id, "queued")

    def ask(self, worker_id: str) -> None:
        if worker_id in self._held:
            return
        crew = Crew(frozenset(WORKERS), self._loaded)
        choice = next_for(worker_id, self._waiting.values(), crew, self._turns, self.now, PATIENCE)
        for job_id in choice.passed:
            self._waiting[job_id] = replace(self._waiting[job_id], passed_at=self.now)
        if choice.job_id is None:
            return
        job = self._held[worker_id] = self._waiting.pop(choice.job_id)
        self._turns[job.priority, job.submitter] = max(self._turns.values(), default=0) + 1
        self.note(job.job_id, "offered", worker_id)

    def end(self, worker_id: str) -> None:
        job = self._held.pop(worker_id, None)
        if job is None:
            return
        lot = self._chance.random()
        if lot < 0.2:
            self._waiting[job.job_id] = replace(job, passed_at=None)
            self.note(job.job_id, "queued", worker_id)
        elif lot < 0.3 and not job.rejections:
            rejected = {worker_id: Rejection("no", worker_id, self.now)}
            self._waiting[job.job_id] = replace(job, passed_at=None, rejections=rejected)
            self.note(job.job_id, "queued", worker_id, is_rejected=True)
        else:
            self.jobs[job.job_id] = replace(self.jobs[job.job_id], status="done", completions=1, results=1)
            self._loaded[worker_id] = job.model
            self.note(job.job_id, "done", worker_id)

    def play(self, steps: int) -> Played:
        for _ in range(steps):
            self.now += self._chance.choice([0.01, 1.0, 3.0])
            step = self._chance.choice([self.come, self.ask, self.ask, self.end])
            step(*(() if step == self.come else (self._chance.choice(WORKERS),)))  # type: ignore[operator]
        while self._waiting or self._held:
            self.now += 3.0
            for worker_id in WORKERS:
                self.end(worker_id)
                self.ask(worker_id)
        return self

    def verdict(self, account: Account | None = None) -> Verdict:
        return judge(History(list(self.jobs.values()), self.events), account or self.account())

    def account(self) -> Account:
        account = Account(taken=set(self.jobs))
        account.delivered.update(event.job_id for event in self.events if event.became == "done")
        return account


@pytest.mark.parametrize("seed", range(20))
def test_judge_finds_nothing_where_the_rules_were_followed(seed: int) -> None:
    """What the studio's own rules choose is right by the judge's, which share nothing with them."""
    played = Played(seed).play(600)
    assert len(played.jobs) > 100
    verdict = played.verdict()
    assert (verdict.lost, verdict.twice, verdict.overtaken, verdict.unfair) == ([], [], [], [])


def test_judge_finds_turns_that_another_rule_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oldest first, and the highest priority last, are found in a history of some length."""

    def oldest(_worker: str, waiting: Iterable[Waiting], *_rest: object) -> object:
        return Choice(min(waiting, key=lambda job: job.number).job_id) if waiting else Choice(None)

    monkeypatch.setattr(f"{__name__}.next_for", oldest)
    verdict = Played(1).play(600).verdict()
    assert verdict.unfair
    assert verdict.overtaken
    assert not verdict.lost
    assert not verdict.twice


def history(*steps: str, jobs: str) -> History:
    """A history by hand. A job is ``NAME SUBMITTER MODEL PRIORITY``, a step ``NAME BECAME WORKER [AT]``."""
    listed = []
    for number, line in enumerate(jobs.split(","), start=1):
        name, submitter, model, priority = line.split()
        listed.append(Job(name, number, model, int(priority), submitter, "done", None, 1, 1))
    events = [Event(job.job_id, "queued") for job in listed]
    for number, step in enumerate(steps):
        name, became, worker_id, *at = step.split()
        moment = float(at[0]) if at else 10.0 + number
        events.append(Event(name, became, worker_id, False, moment, moment, moment))  # type: ignore[arg-type]
    return History(listed, events)


def found(played: History) -> tuple[int, int, int]:
    """How many offers were unfair, overtook, held twice."""
    verdict = judge(played, Account(taken={job.job_id for job in played.jobs}))
    return len(verdict.unfair), len(verdict.overtaken), len(verdict.twice)


def test_judge_finds_one_who_was_served_twice_before_another_once() -> None:
    """Round robin: after ann's first it is bob's turn, however many she has."""
    jobs = "a1 ann A 0, a2 ann A 0, b1 bob A 0"
    assert found(history("a1 offered w", "b1 offered v", "a2 offered u", jobs=jobs)) == (0, 0, 0)
    assert found(history("a1 offered w", "a2 offered v", "b1 offered u", jobs=jobs)) == (1, 0, 0)


def test_judge_finds_a_later_job_of_one_person_before_an_earlier() -> None:
    """Each person's jobs of a model come in the order in which they were queued."""
    assert found(history("a2 offered w", "a1 offered v", jobs="a1 ann A 0, a2 ann A 0")) == (1, 0, 0)


def test_judge_finds_a_lower_priority_that_went_first() -> None:
    """A higher priority goes first, whoever queued it."""
    assert found(history("a1 offered w", "b1 offered v", jobs="a1 ann A 0, b1 bob A 5")) == (0, 1, 0)


def test_judge_allows_affinity_for_so_long_and_no_longer() -> None:
    """A worker goes on with its model, past whoever's turn it is, for twenty seconds in sum."""
    jobs = "x xi A 0, a1 ann B 0, b1 bob A 0, b2 bob A 0, b3 bob A 0"
    begin = ("x offered w 10", "x done w 11", "b1 offered w 12", "b1 done w 13")
    in_time = ("b2 offered w 20", "b2 done w 21", "a1 offered w 34", "b3 offered v 35")
    late = ("b2 offered w 34", "b2 done w 35", "a1 offered w 36", "b3 offered v 37")
    assert PATIENCE.affinity_s == PATIENCE_S
    assert found(history(*begin, *in_time, jobs=jobs)) == (0, 0, 0)
    assert found(history(*begin, *late, jobs=jobs)) == (1, 0, 0)


def test_judge_finds_workers_left_idle_for_a_model_that_too_few_have() -> None:
    """One worker is waited for by one job: a second of its model goes to anybody, before those behind it."""
    jobs = "x xi A 0, a1 ann A 0, {}b1 bob B 0"
    begin = ("x offered w 10", "x done w 11")
    assert found(history(*begin, "b1 offered v 12", "a1 offered w 13", jobs=jobs.format(""))) == (0, 0, 0)
    waiting = jobs.format("a2 ann A 0, ")
    late = (*begin, "b1 offered v 12", "a1 offered w 13", "a2 offered u 14")
    assert found(history(*late, jobs=waiting)) == (1, 0, 0)


def test_judge_allows_what_could_not_be_seen_yet() -> None:
    """An offer is right by what was committed while it was made, and not by what was long before."""
    names = {"a1": "ann", "a2": "ann", "b1": "bob"}
    jobs = [
        Job(name, number, "A", 0, who, "done", None, 1, 1)
        for number, (name, who) in enumerate(names.items(), start=1)
    ]
    come = [Event(job.job_id, "queued") for job in jobs]
    first = Event("a1", "offered", "w", False, 10.0, 10.1, 10.2)

    def unfair(began: float) -> int:
        second = Event("b1", "offered", "v", False, 10.1, 10.1, 10.3)
        third = Event("a2", "offered", "u", False, began, 10.4, 10.5)
        other = Event("b2", "queued", "", False, 10.3, 10.3, 10.4)
        listed = [*jobs, Job("b2", 0, "A", 5, "bob", "done", None, 1, 1)]
        verdict = judge(History(listed, [*come, first, second, other, third]), Account())
        return len(verdict.overtaken)

    assert unfair(began=10.39) == 0
    assert unfair(began=11.0) == 1


@pytest.mark.parametrize(
    ("late", "came", "unfair"),
    [(["b1"], 9.999, 0), (["b1"], 9.8, 1), (["b1", "c1"], 9.999, 1), ([], 9.999, 0)],
    ids=["just now", "long ago", "two of them", "none"],
)
def test_judge_allows_one_commit_that_was_seen_after_a_later_one(
    late: list[str], came: float, unfair: int
) -> None:
    """Commits are not always seen in the order of their times, but within a moment, and one in the midst."""
    names = ["a1", "a2", *late]
    jobs = [Job(name, number, "A", 0, name[0], "done") for number, name in enumerate(names, start=1)]
    queued = [Event(name, "queued", "", False, 1.0, 1.0, 1.0) for name in ("a1", "a2")]
    queued += [Event(name, "queued", "", False, came, came, came) for name in late]
    first = Event("a1", "offered", "w", False, 9.7, 9.98, 10.0)
    second = Event("a2", "offered", "v", False, 10.01, 10.02, 10.03)
    assert len(judge(History(jobs, [*queued, first, second]), Account()).unfair) == unfair


def test_judge_finds_a_job_that_two_workers_had() -> None:
    """A claim is given back before somebody else gets it."""
    jobs = "a1 ann A 0"
    assert found(history("a1 offered w", "a1 queued w", "a1 offered v", jobs=jobs)) == (0, 0, 0)
    assert found(history("a1 offered w", "a1 offered v", jobs=jobs)) == (0, 0, 1)


@pytest.mark.parametrize(
    "kind", ["gone", "not ended", "failed unasked", "no result", "no picture", "with a worker", "nobody's"]
)
def test_judge_finds_a_lost_job(kind: str) -> None:
    """One job that went missing among hundreds is found, however it did."""
    played = Played(3).play(600)
    account, stored = played.account(), set(played.jobs)
    (job, *_) = played.jobs.values()
    match kind:
        case "gone":
            del played.jobs[job.job_id]
        case "not ended":
            played.jobs[job.job_id] = replace(job, status="running")
        case "failed unasked":
            played.jobs[job.job_id] = replace(job, status="failed", reason="the studio was restarted")
        case "no result":
            played.jobs[job.job_id] = replace(job, results=0)
        case "no picture":
            stored.remove(job.job_id)
        case "with a worker":
            account.kept.add(job.job_id)
        case "nobody's":
            account.taken.remove(job.job_id)
    verdict = judge(History(list(played.jobs.values()), played.events), account, stored)
    assert len(verdict.lost) >= 1
    assert not verdict.is_clean


def test_judge_finds_a_job_recorded_twice() -> None:
    """Done twice in the database, or two workers told that theirs was taken."""
    played = Played(3).play(600)
    (done, *_) = (event for event in played.events if event.became == "done")
    played.events.append(done)
    assert len(played.verdict().twice) == 2
    played.events.pop()
    account = played.account()
    account.delivered[done.job_id] += 1
    assert len(played.verdict(account).twice) == 1
    assert not played.verdict().twice


def test_judge_keeps_what_a_broken_promise_was_found_by(tmp_path: Path) -> None:
    """A run that was not clean can be judged again; one that was leaves nothing."""
    right = Played(3).play(600)
    wrong = history("a2 offered w", "a1 offered v", jobs="a1 ann A 0, a2 ann A 0")
    clean = judge_and_keep(
        tmp_path, History(list(right.jobs.values()), right.events), right.account(), None, {}
    )
    assert clean.is_clean
    assert list(tmp_path.iterdir()) == []
    found_first = judge_and_keep(tmp_path, wrong, Account(taken={"a1", "a2"}), None, {"w": [(1.0, 2.0)]})
    assert judge_again(tmp_path) == found_first
    assert found_first.unfair
