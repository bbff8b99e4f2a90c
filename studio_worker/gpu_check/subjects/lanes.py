"""Lanes on the device: whether it works on while finished pictures are encoded and sent.

The link is played: sending a picture takes half as long as making one, whatever the device. One lane then
leaves the device idle for a third of the time and more; two need not leave it idle at all.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from studio_worker.engine import Engine, Made, Request, StepProgress
from studio_worker.gpu_check.subjects.bench import Bench, bench, seconds
from studio_worker.gpu_check.subjects.lab import Lab
from studio_worker.jobs import Cancel
from studio_worker.work.turns import Turns

GOAL_SHARE = 0.98
JOBS = 8
JOBS_LIMIT_S = 10.0
"""For each number of lanes; a slow card makes as many as it can, two at least."""
SENDING_SHARE = 0.5


class _InTurn(Engine):
    """An engine as a lane has it: what needs the device is done by the thread that has it, the rest here."""

    def __init__(self, engine: Engine, turns: Turns) -> None:
        self._engine = engine
        self._turns = turns
        self.spans: list[tuple[float, float]] = []
        """When each picture came to the device, and left it."""

    def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
        return self._turns.ask(partial(self._make, request, progress, cancel), request.model).result()

    def _make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
        began = time.perf_counter()
        made = self._engine.make(request, progress, cancel)
        self.spans.append((began, time.perf_counter()))
        return made


def slow_link(lab: Lab, case: str) -> None:
    """The share of the time that the engine works behind a slow link, with one lane and with two."""
    model = bench(lab, case)
    model.job(0)
    picture_s = seconds(lambda: model.job(1))
    lab.note(picture_s=picture_s, sending_s=SENDING_SHARE * picture_s)
    lab.note(one_lane_share=_share(lab, model, 1, SENDING_SHARE * picture_s))
    lab.goal("two_lanes_share", _share(lab, model, 2, SENDING_SHARE * picture_s), least=GOAL_SHARE)


def _share(lab: Lab, model: Bench, lanes: int, sending_s: float) -> float:
    """How much of the time from the first picture's end to the last one's the engine works."""
    turns = Turns()
    engine = _InTurn(model.engine, turns)
    numbers = iter(range(2, 2 + (3 if lab.small else JOBS)))
    until = time.perf_counter() + JOBS_LIMIT_S
    never = threading.Event()
    errors: list[BaseException] = []

    def lane() -> None:
        try:
            for number in numbers:
                model.job(number, engine)
                never.wait(sending_s)
                if len(engine.spans) > 1 and time.perf_counter() > until:
                    return
        except BaseException as error:  # it is the row's
            errors.append(error)

    def end() -> None:
        for thread in threads:
            thread.join()
        turns.close()

    threads = [threading.Thread(target=lane, daemon=True) for _ in range(lanes)]
    for thread in (*threads, threading.Thread(target=end, daemon=True)):
        thread.start()
    turns.serve()
    if errors:
        raise errors[0]
    (_, first_end), *others = engine.spans
    return sum(end - began for began, end in others) / (others[-1][1] - first_end)
