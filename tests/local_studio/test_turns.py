"""Who is offered which job, whatever waits and whoever asks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from studio_worker.local_studio.rules import Rejection
from studio_worker.local_studio.turns import PATIENCE, Choice, Crew, Turns, Waiting, next_for

NOW = 1_000_000.0
WORKERS = ("anna", "bert", "cora")
PEOPLE = ("pia", "quin", "rosa")
MODELS = ("flux", "sdxl")
NOBODY = Crew()

ages = st.one_of(st.none(), st.floats(0, 2 * PATIENCE.affinity_s).map(lambda age: NOW - age))
rejections = st.dictionaries(
    st.sampled_from(WORKERS),
    st.floats(0, 2 * PATIENCE.ask_again_s).map(lambda age: Rejection("too large", "box", NOW - age)),
)
crews = st.builds(
    Crew,
    ready=st.frozensets(st.sampled_from(WORKERS)),
    last_made=st.dictionaries(st.sampled_from(WORKERS), st.sampled_from(MODELS)),
)
rounds = st.dictionaries(
    st.tuples(st.integers(0, 1), st.sampled_from(PEOPLE)), st.integers(1, 9), max_size=6
).map(lambda turns: {key: number for number, key in enumerate(sorted(turns, key=turns.__getitem__), start=1)})


@st.composite
def queues(draw: st.DrawFn, rejected: bool = True) -> list[Waiting]:
    count = draw(st.integers(0, 12))
    return [
        Waiting(
            job_id=f"job {number}",
            number=number,
            model=draw(st.sampled_from(MODELS)),
            priority=draw(st.integers(0, 1)),
            submitter=draw(st.sampled_from(PEOPLE)),
            passed_at=draw(ages),
            rejections=draw(rejections) if rejected and draw(st.booleans()) else {},
        )
        for number in range(count)
    ]


def ask(
    worker: str, waiting: list[Waiting], crew: Crew = NOBODY, turns: Turns | None = None, now: float = NOW
) -> Choice:
    return next_for(worker, waiting, crew, turns or {}, now, PATIENCE)


def chosen(
    worker: str, waiting: list[Waiting], crew: Crew = NOBODY, turns: Turns | None = None
) -> Waiting | None:
    job_id = ask(worker, waiting, crew, turns).job_id
    return next((job for job in waiting if job.job_id == job_id), None)


# --- order ------------------------------------------------------------------------------------------


@given(st.permutations(range(5)))
def test_turns_oldest_first_where_nothing_is_said(order: list[int]) -> None:
    """Jobs without priority and submitter are offered in the order in which they came."""
    waiting = [Waiting(f"job {number}", number, "flux") for number in order]
    assert ask("anna", waiting) == Choice("job 0")


@given(queues(), st.sampled_from(WORKERS), crews, rounds)
def test_turns_higher_priority_first(waiting: list[Waiting], worker: str, crew: Crew, turns: Turns) -> None:
    """A lower priority goes only while the higher ones are not for this worker, or wait for a better one."""
    job = chosen(worker, waiting, crew, turns)
    higher = [each for each in waiting if job is None or each.priority > job.priority]
    others = crew.ready - {worker}
    for each in higher:
        waits_for_another = any(crew.last_made.get(other) == each.model for other in others)
        assert worker in each.rejections or waits_for_another


@given(st.lists(st.sampled_from(PEOPLE), max_size=40), rounds)
def test_turns_go_round(queued_by: list[str], turns: Turns) -> None:
    """Of people who wait, none is ever two turns ahead of another, however much each has queued."""
    waiting = [Waiting(f"job {n}", n, "flux", submitter=who) for n, who in enumerate(queued_by)]
    served: Counter[str] = Counter()
    numbers = dict(turns)
    while waiting:
        job = chosen("anna", waiting, Crew(), numbers)
        assert job is not None
        served[job.submitter] += 1
        numbers[job.priority, job.submitter] = max(numbers.values(), default=0) + 1
        waiting.remove(job)
        left = [served[who] for who in PEOPLE if any(each.submitter == who for each in waiting)]
        assert not left or max(left) - min(left) <= 1


def test_turns_one_job_is_not_held_up_by_ten_thousand() -> None:
    """Whoever comes with one job after somebody with many is served next."""
    many = [Waiting(f"job {n}", n, "flux", submitter="pia") for n in range(10_000)]
    one = Waiting("the one", 10_000, "flux", submitter="quin")
    assert ask("anna", [*many, one], turns={(0, "pia"): 7}).job_id == "the one"


@given(queues(), st.sampled_from(WORKERS), crews, rounds)
def test_turns_need_only_the_heads(waiting: list[Waiting], worker: str, crew: Crew, turns: Turns) -> None:
    """The oldest job of each priority, person and model stands for all behind it, but for rejected ones."""
    heads: dict[tuple[int, str, str], Waiting] = {}
    for job in waiting:
        if not job.rejections:
            line = (job.priority, job.submitter, job.model)
            heads[line] = replace(heads[line], alike=heads[line].alike + 1) if line in heads else job
    few = [*heads.values(), *(job for job in waiting if job.rejections)]
    assert ask(worker, few, crew, turns).job_id == ask(worker, waiting, crew, turns).job_id


# --- affinity ---------------------------------------------------------------------------------------


def test_turns_the_worker_with_the_model_comes_first() -> None:
    """A job waits for the worker that made its model last; another one takes what is nobody's meanwhile."""
    flux, sdxl = Waiting("a", 1, "flux"), Waiting("b", 2, "sdxl")
    crew = Crew(frozenset({"anna", "bert"}), {"anna": "flux"})
    assert ask("bert", [flux, sdxl], crew) == Choice("b", passed=("a",))
    assert ask("bert", [flux], crew) == Choice(None, passed=("a",))
    assert ask("anna", [flux, sdxl], crew) == Choice("a")


def test_turns_a_model_that_many_want_is_loaded_by_more_workers() -> None:
    """One worker with the model loaded does not keep a thousand jobs from those that are idle."""
    many = [Waiting(f"job {n}", n, "flux") for n in range(1000)]
    crew = Crew(frozenset(WORKERS), {"anna": "flux", "bert": "flux"})
    assert ask("cora", many, crew) == Choice("job 0")
    assert ask("cora", many[:3], crew) == Choice("job 0")
    assert ask("cora", many[:2], crew) == Choice(None, passed=("job 0",))
    assert ask("cora", [replace(many[0], alike=1000)], crew) == Choice("job 0")


def test_turns_a_worker_goes_on_with_its_model() -> None:
    """Two models queued by turns do not make a worker load one after the other."""
    waiting = [Waiting(f"job {n}", n, MODELS[n % 2]) for n in range(6)]
    crew = Crew(frozenset({"anna"}), {"anna": "sdxl"})
    made = []
    for now in (NOW, NOW + 5, NOW + 10):
        choice = ask("anna", waiting, crew, now=now)
        made.append(choice.job_id)
        waiting = [
            replace(job, passed_at=now) if job.job_id in choice.passed else job
            for job in waiting
            if job.job_id != choice.job_id
        ]
    assert made == ["job 1", "job 3", "job 5"]
    assert waiting[0].passed_at == NOW, "its turn came once, and is not put off by later ones"


@given(queues(), st.sampled_from(WORKERS), crews, rounds)
def test_turns_waiting_for_a_model_has_a_limit(
    waiting: list[Waiting], worker: str, crew: Crew, turns: Turns
) -> None:
    """A job whose turn has come is passed over for affinity's sake no longer than the limit."""
    before = [job for job in waiting if worker not in job.rejections]
    plain = ask(worker, before, replace(crew, last_made={}), turns).job_id
    turn = next((job for job in before if job.job_id == plain), None)
    if turn is None or turn.passed_at is None or NOW - turn.passed_at < PATIENCE.affinity_s:
        return
    assert ask(worker, before, crew, turns).job_id == turn.job_id


@given(queues(rejected=False), crews)
def test_turns_waiting_leaves_nobody_without_work(waiting: list[Waiting], crew: Crew) -> None:
    """While anything is queued, at least one of the workers that are ready is offered something."""
    if waiting and crew.ready:
        assert any(ask(worker, waiting, crew).job_id for worker in crew.ready)


# --- rejections -------------------------------------------------------------------------------------


@given(queues(), st.sampled_from(WORKERS), crews, rounds)
def test_turns_rejected_jobs_go_to_others(
    waiting: list[Waiting], worker: str, crew: Crew, turns: Turns
) -> None:
    """A worker is asked again only where nobody else is left that has not been, and after a while."""
    job = chosen(worker, waiting, crew, turns)
    if job is not None and worker in job.rejections:
        assert crew.ready - {worker} <= set(job.rejections)
        assert NOW - job.rejections[worker].at >= PATIENCE.ask_again_s


def test_turns_rejected_jobs_come_back_when_nobody_else_is_left() -> None:
    """Where all have rejected a job, each is asked again; a disk may have room by then."""
    soon, later = NOW + 1, NOW + PATIENCE.ask_again_s
    job = Waiting("a", 1, "flux", rejections={"anna": Rejection("disk too small", "box", NOW)})
    alone, with_bert = Crew(frozenset({"anna"})), Crew(frozenset({"anna", "bert"}))
    assert ask("anna", [job], alone, now=soon).job_id is None
    assert ask("anna", [job], with_bert, now=later).job_id is None
    assert ask("bert", [job], with_bert).job_id == "a"
    assert ask("anna", [job], alone, now=later).job_id == "a"
