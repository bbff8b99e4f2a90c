"""The second job of a model beside its later ones; ``make bench`` prints it.

What is done once, and too late for the first job, would show in the second. On a machine that others use
too, single jobs vary by several per cent, so this asks many fresh processes: each is forked from one that has
imported everything and computed nothing (threads of torch's would not survive that). Their jobs have few
steps, so that what a job has besides its steps shows; each second job is compared with those that follow it
at once. What that is of a job of the usual length is what the goal is about. On a CPU they compute in one
thread: two wait for each other whenever somebody else has a core, which doubles the spread. The third job,
which should be like any other, shows what the measuring itself makes of two that are alike.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studio_worker.box import process
from studio_worker.engine.diffusion import DiffusionEngine
from tests.bench.engine import SAMPLE_MODEL, Model, device, made, random_model, show, written

GOAL = 1.01
PROCESSES = 80
JOBS = 6
SHORT = {"sample model": 2, "random model": 1}
"""Steps of the jobs that are measured."""

Times = tuple[list[float], list[float]]
"""Seconds of each job of a process, on the clock and of its CPU time."""


def main(processes: int = PROCESSES) -> None:
    """Measure both models; print each row as it is measured."""
    print(f"second job, {processes} fresh processes of {JOBS} jobs each; median (95% interval)", flush=True)
    measure(SAMPLE_MODEL, processes)
    with tempfile.TemporaryDirectory() as folder:
        fresh(lambda: random_model(Path(folder)).model.name)
        measure(written(Path(folder)), processes)


def measure(model: Model, processes: int) -> None:
    """Print the row of ``model``."""
    short = replace(model, steps=SHORT[model.name])
    usual_s = statistics.median(fresh(lambda: times_s(model))[0][2:])
    runs = [fresh(lambda: times_s(short)) for _ in range(processes)]
    clock, cpu = ([run[index] for run in runs] for index in (0, 1))
    short_s = statistics.median(statistics.median(run[2:]) for run in clock)
    second = over_later(clock, 1)
    of_usual = interval([1 + (ratio - 1) * short_s / usual_s for ratio in second])
    verdict = "met" if of_usual[2] <= GOAL else "missed" if of_usual[0] > GOAL else "not decided"
    measured, by_cpu, third = map(interval, (second, over_later(cpu, 1), over_later(clock, 2)))
    beside = (
        f"a job of {model.steps} steps, {usual_s:.3f} s; goal {GOAL}: {verdict}; as measured, {short.steps} "
        f"steps, {short_s:.3f} s: {words(measured)}, by CPU time {words(by_cpu)}, third job likewise "
        f"{words(third)}"
    )
    show((f"{model.name}: second job over later ones", words(of_usual), beside))


def times_s(model: Model) -> Times:
    """Of the first jobs of this process."""
    torch.set_num_threads(1)
    engine = DiffusionEngine(device(), families=(model.family,))
    found: Times = ([], [])
    for seed in range(JOBS):
        started = time.perf_counter(), time.process_time()
        made(engine, model, seed)
        found[0].append(time.perf_counter() - started[0])
        found[1].append(time.process_time() - started[1])
    return found


def over_later(runs: Sequence[Sequence[float]], job: int) -> list[float]:
    """The time of one job over the median of those after it, of each process."""
    return [run[job] / statistics.median(run[max(job + 1, 2) :]) for run in runs]


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median with its 95% interval, by the bootstrap: of 5000 samples drawn from the ratios."""
    draws = np.random.default_rng(0).choice(ratios, (5000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), statistics.median(ratios), float(high)


def words(found: tuple[float, float, float]) -> str:
    low, middle, high = found
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def fresh(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a process forked from this one.

    Raises:
        EOFError: it failed; its traceback is on standard error.
    """
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=lambda: writer.send(work()))
    process.start()
    writer.close()
    found = reader.recv()
    process.join()
    return found


if __name__ == "__main__":
    process.prepare()
    main(*map(int, sys.argv[1:]))
