"""What must leave nothing behind: a cancelled job, memory that ran out, a switch of models.

After each the same seed makes the same bytes as before, and the device's memory is what it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.stable_diffusion import SAMPLE as SAMPLE_FAMILY
from studio_worker.errors import JobCancelled, JobError
from studio_worker.gpu_check.rows import Missed
from studio_worker.gpu_check.subjects.asking import SAMPLE, make
from studio_worker.gpu_check.subjects.lab import Lab
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import LocalFile

MIB = 1 << 20
SPARE_BYTES = 48 * MIB
"""What memory is left where it is made scarce: the sample model's small pictures need less."""

_SIDE_SCARCE = 512
"""Pixels a side for which the sample model's VAE needs some 200 MiB."""

ROUNDS = 3

Files = tuple[LocalFile, ...]


class Bench:
    """An engine with two models, whose pictures are known.

    Args:
        files: of the models; of the first the pictures are compared.
    """

    def __init__(self, lab: Lab, engine: DiffusionEngine, files: tuple[Files, Files]) -> None:
        self._lab = lab
        self.engine = engine
        self.files = files
        self.before = {index: self.picture(index).data for index in (0, 1)}
        self._memory = self._taken()

    def picture(self, index: int = 0, **asked: Any) -> Picture:
        return make(self.engine, self.files[index], **asked)

    def _taken(self) -> int | None:
        """Bytes that are in use on the device once no model is there."""
        self.engine.release()
        self._lab.tidy()
        return self._lab.gpu.allocated_bytes()

    def check(self) -> None:
        """
        Raises:
            Missed: a picture is another one now, or memory has not come back.
        """
        for index, data in self.before.items():
            if self.picture(index).data != data:
                raise Missed(f"the same seed makes another picture than before, of model {index}")
        taken = self._taken()
        if taken is None or self._memory is None:
            self._lab.note(memory="skipped: CPU")
            return
        left = (taken - self._memory) / MIB
        self._lab.goal("left_behind_mib", left, most=1.0)


@contextmanager
def _bench(lab: Lab) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
        other = tiny("z-image", Path(folder))
        engine = DiffusionEngine(lab.device, families=(SAMPLE_FAMILY, other.family))
        yield Bench(lab, engine, ((SAMPLE,), other.files("Q8_0")))


def cancelled(lab: Lab) -> None:
    """Jobs that are stopped at every step."""
    with _bench(lab) as bench:
        for number in range(ROUNDS):
            _cancel(bench, at_step=1 + number)
        lab.note(cancelled=ROUNDS)
        bench.check()


def _cancel(bench: Bench, at_step: int) -> None:
    cancel = Cancel()

    def progress(done: int, _total: int) -> None:
        if done >= at_step:
            cancel.set("gpu-check")

    try:
        bench.picture(progress=progress, cancel=cancel, steps=ROUNDS + 2)
    except JobCancelled:
        return
    raise Missed(f"a job that was cancelled at step {at_step} went on to its end")


def exhausted(lab: Lab) -> None:
    """Jobs for which memory does not suffice fail, or are made leaner; the next ones are as before."""
    with _bench(lab) as bench:
        ends = []
        for _ in range(ROUNDS):
            bench.picture()
            with lab.gpu.scarce(SPARE_BYTES):
                ends.append(_end_of(lambda: bench.picture(width=_SIDE_SCARCE, height=_SIDE_SCARCE, steps=1)))
        lab.note(ends=ends)
        if not all("memory" in end or "tiled" in end or "offload" in end for end in ends):
            raise Missed(f"memory was scarce and nothing came of it: {ends}")
        bench.check()


def _end_of(job: Callable[[], Picture]) -> str:
    """What becomes of a job: its error, or how it was made."""
    try:
        meta = job().meta
    except JobError as error:
        return str(error)
    ways = [f"offload {meta['offload']}"] if "offload" in meta else []
    return ", ".join(ways + (["tiled VAE"] if meta.get("tiledVae") else [])) or "made as if there were enough"


def switched(lab: Lab) -> None:
    """Two models in turn, one on the device at a time."""
    with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
        other = tiny("z-image", Path(folder))
        # Less than both together: each leaves for the other.
        budget = SAMPLE.path.stat().st_size
        families = (SAMPLE_FAMILY, other.family)
        engine = DiffusionEngine(lab.device, budget_bytes=budget, families=families)
        bench = Bench(lab, engine, ((SAMPLE,), other.files("Q8_0")))
        places = []
        for _ in range(ROUNDS):
            for index in (0, 1):
                bench.picture(index)
                places.append({name: model.place for name, model in engine.resident().items()})
        lab.note(switches=len(places), places=places[-1])
        bench.check()
