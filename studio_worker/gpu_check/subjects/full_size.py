"""Models of full size, timed: jobs beside the plain pipeline, many in a row, and the inside of a step."""

from __future__ import annotations

import statistics
import time
from collections import Counter

import torch

from studio_worker.box.device import probe
from studio_worker.engine.memory.placement import Mode, Plan
from studio_worker.gpu_check.rows import Missed, Skipped
from studio_worker.gpu_check.subjects.asking import levels_apart
from studio_worker.gpu_check.subjects.bench import Bench, bench, seconds
from studio_worker.gpu_check.subjects.estimates import Capped, plans
from studio_worker.gpu_check.subjects.lab import Lab
from studio_worker.gpu_check.trace import MARK

GOAL_RATIO = 1.03
GOAL_SHARE = 0.97
GOAL_ESTIMATE = 0.10

JOBS = 30
JOBS_LIMIT_S = 80.0
"""A slow card makes as many jobs as it can meanwhile, and says how many."""

PAIRS = 6
PAIRS_LIMIT_S = 35.0
FEW = 3


def first_job(lab: Lab, case: str) -> None:
    """From files to the first picture, and what it takes of memory beside what was estimated."""
    lab.forget("bench")
    lab.gpu.begin_peak()
    model = bench(lab, case)
    size_bytes = sum(file.path.stat().st_size for file in model.files)
    lab.note(files_gb=size_bytes / 1e9, written_s=model.wrote_s)
    first = None

    def make() -> None:
        nonlocal first
        first = model.job(0)

    lab.note(first_job_s=seconds(make))
    assert first is not None
    lab.note(load_s=first.timings_s["load"], dtype=first.meta["dtype"])
    if (loading := lab.gpu.peak_bytes()) is None:
        model.job(1)
        lab.note(memory="skipped: CPU")
        return
    lab.gpu.begin_peak()
    job_s = seconds(lambda: model.job(1))
    peak = lab.gpu.peak_bytes() or 0
    plan = _whole_plan(model)
    lab.note(second_job_s=job_s, loading_peak_gb=loading / 1e9, peak_gb=peak / 1e9)
    lab.note(estimated_gb=plan.peak_bytes / 1e9, unpacked=", ".join(sorted(plan.unpacked)) or "nothing")
    lab.goal("estimate_off", abs(plan.peak_bytes / peak - 1), most=GOAL_ESTIMATE)


def _whole_plan(model: Bench) -> Plan:
    """The plan by which the engine has the model on the device: that of weights as large as those are."""
    loaded = model.engine.resident()[model.files[0].path.name].size_bytes
    return min(
        _whole_plans(model),
        key=lambda plan: (abs(plan.peak_bytes - plan.working_bytes - loaded), plan.tiled),
    )


def _whole_plans(model: Bench) -> list[Plan]:
    is_guided = model.case.guidance != 1
    ways = plans(model.files, model.case.family, model.device, model.case.side**2, guided=is_guided)
    return [plan for plan in ways if plan.mode is Mode.WHOLE]


def beside_plain(lab: Lab, case: str) -> None:
    """A job beside one call of the library's pipeline with the same components, turn by turn."""
    model = bench(lab, case)
    model.job(0)
    plain = model.plain()
    with model.evaluations() as ours_seen:
        model.job(0)
    with model.evaluations() as theirs_seen:
        plain(0)
    if sum(ours_seen) != sum(theirs_seen):
        raise Missed(f"not alike: the denoiser saw {sum(ours_seen)} pictures here, {sum(theirs_seen)} there")
    ours: list[float] = []
    theirs: list[float] = []
    began = time.perf_counter()
    for seed in range(1, 1 + (2 if lab.small else PAIRS)):
        turns = [(ours, lambda seed=seed: model.job(seed)), (theirs, lambda seed=seed: plain(seed))]
        for seen, work in turns if seed % 2 else turns[::-1]:  # who goes first changes every time
            seen.append(seconds(work))
        if time.perf_counter() - began > PAIRS_LIMIT_S:
            break
    job_s = statistics.median(ours)
    lab.note(job_s=job_s, plain_s=statistics.median(theirs), pairs=len(ours))
    lab.note(step_s=_step_s(model, model.case.side))
    ratio = statistics.median(mine / plains for mine, plains in zip(ours, theirs, strict=True))
    lab.goal("ratio", ratio, most=GOAL_RATIO)


def _step_s(model: Bench, side: int) -> float:
    """Seconds from one step to the next, by a job of full length and one of half as many steps."""
    counts = (model.case.steps, model.case.steps // 2)
    long_s, short_s = (
        min(model.job(n, steps=count, width=side, height=side).timings_s["generate"] for n in (1, 2))
        for count in counts
    )
    return (long_s - short_s) / (counts[0] - counts[1])


def in_a_row(lab: Lab, case: str) -> None:
    """Many jobs in a row: pictures a second, and how much of the time the GPU has something to compute."""
    model = bench(lab, case)
    model.job(0)
    encoded: list[float] = []
    with lab.gpu.watched() as shares:
        began = time.perf_counter()
        while len(encoded) < (FEW if lab.small else JOBS):
            encoded.append(model.job(100 + len(encoded)).timings_s["encode"])
            if time.perf_counter() - began > JOBS_LIMIT_S:
                break
        took_s = time.perf_counter() - began
    lab.note(jobs=len(encoded), pictures_per_s=len(encoded) / took_s, encode_s=statistics.median(encoded))
    if shares.mean is None:
        lab.note(gpu_share="not told by the driver" if lab.gpu.is_cuda else "skipped: CPU")
        return
    lab.goal("gpu_share", shares.mean, least=GOAL_SHARE)


def inside(lab: Lab, case: str) -> None:
    """Between two steps the host never waits for the GPU; what it launches, and how long that takes it."""
    model = bench(lab, case)
    model.job(0)
    steps = 2 if lab.small else 5

    def mark(done: int, total: int) -> None:
        if 0 < done < total:  # not while something is loaded, nor the last: then it decodes
            with torch.profiler.record_function(MARK):
                pass

    with lab.gpu.profiled() as traces:
        model.job(1, steps=steps + 2, progress=mark)
    trace = traces[0]
    lab.note(launches_per_step=trace.launches / max(1, trace.steps), profiled_steps=trace.steps)
    # So small a picture that the GPU is done before the host has launched the next step.
    lab.note(host_step_s=_step_s(model, 64 if lab.small else 256))
    if trace.busy_share is not None:
        lab.note(gpu_share_inside=trace.busy_share)
    places = _waits(lab, model, steps + 2)
    waits = max(sum(trace.waits.values()), places.total())
    lab.note(waits=waits, waits_in=dict(trace.waits), waits_at=dict(places))
    if trace.steps < 1 or (lab.gpu.is_cuda and not trace.launches):
        raise Missed("the profiler has not seen what CUDA is asked for")
    if waits:
        raise Missed(
            f"the host waits {waits} times in {trace.steps} steps: {', '.join(places or trace.waits)}"
        )


def _waits(lab: Lab, model: Bench, steps: int) -> Counter[str]:
    """The places at which the host waits between two steps."""
    with lab.gpu.waits() as places:
        between: list[int] = []

        def progress(done: int, total: int) -> None:
            if done in {1, total - 1}:
                between.append(len(places))

        model.job(2, steps=steps, progress=progress)
    return Counter(places[between[0] : between[-1]] if between else [])


def packed(lab: Lab, case: str) -> None:
    """Quantised weights that stay packed on the device beside those that are written out once."""
    model = bench(lab, case)
    free = [model.job(seed) for seed in range(FEW)]
    unpacked_s = statistics.median(each.timings_s["generate"] for each in free[1:])
    model.drop_engine()
    most = max(plan.peak_bytes for plan in _whole_plans(model) if not plan.unpacked)
    engine = model.new_engine(memory=Capped(model.device, int(most * 1.02)))
    tight = [model.job(seed, engine) for seed in range(FEW)]
    packed_s = statistics.median(each.timings_s["generate"] for each in tight[1:])
    lab.note(unpacked_s=unpacked_s, packed_s=packed_s, faster=packed_s / unpacked_s)
    apart = max(levels_apart(one, other) for one, other in zip(free, tight, strict=True))
    lab.goal("levels_apart", apart, most=0.0)


def compiled(lab: Lab, case: str) -> None:
    """The denoiser's blocks compiled beside those that are not."""
    model = bench(lab, case)
    plain = [model.job(seed) for seed in range(FEW)]
    model.drop_engine()
    engine = model.new_engine(compiles=True)
    lab.note(first_job_s=seconds(lambda: model.job(0, engine)))
    faster = [model.job(seed, engine) for seed in range(FEW)]
    if not faster[-1].meta.get("compiled"):
        facts = probe(lab.device, compiles=True)
        raise Missed("nothing was compiled") if facts["ok"] else Skipped(facts["error"])
    off_s, on_s = (statistics.median(each.timings_s["generate"] for each in jobs) for jobs in (plain, faster))
    apart = max(levels_apart(one, other) for one, other in zip(plain, faster, strict=True))
    lab.note(off_s=off_s, on_s=on_s, faster=off_s / on_s, levels_apart=apart)
