"""A model on its engine, timed: its jobs, and the library's plain pipeline over the very same components."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import EulerDiscreteScheduler

from studio_worker import sample_model
from studio_worker.engine import Engine
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.loading import load_scheduler, load_tokenizer
from studio_worker.gpu_check.subjects.asking import make
from studio_worker.gpu_check.subjects.cases import Case, case
from studio_worker.gpu_check.subjects.lab import Lab
from studio_worker.gpu_check.subjects.random_weights import Drawn
from studio_worker.jobs import Picture
from studio_worker.models import LocalFile


class Bench:
    """One model of full size (in a rehearsal a small one) for the rows that time it."""

    def __init__(self, lab: Lab, name: str) -> None:
        folder = lab.folder / "full-size" / name
        folder.mkdir(parents=True, exist_ok=True)
        self.case: Case = case(name, folder / "configuration", small=lab.small)
        self.case.check_room(folder, lab.gpu.total_bytes())
        self.name = name
        self.device = lab.device
        self._tidy = lab.tidy
        self.files, self.wrote_s = _files(self.case, folder, lab.device)

    @cached_property
    def engine(self) -> DiffusionEngine:
        """With nothing loaded at first."""
        return self.new_engine()

    def drop_engine(self) -> None:
        """Let go of what is loaded."""
        self.__dict__.pop("engine", None)
        self._tidy()

    def new_engine(self, **options: Any) -> DiffusionEngine:
        return DiffusionEngine(self.device, families=(self.case.family,), **options)

    def job(self, seed: int, engine: Engine | None = None, **asked: Any) -> Picture:
        """One picture, with other words for every seed, so that none that were kept are of use."""
        own = {"width": self.case.side, "height": self.case.side, "steps": self.case.steps}
        task: dict[str, Any] = {"ext": "webp", "cfg_scale": self.case.guidance, **own, **asked}
        return make(engine or self.engine, self.files, prompt=words(seed), seed=seed, **task)

    def components(self) -> dict[str, torch.nn.Module]:
        """What the engine has loaded, by the names that the family gives."""
        name = self.files[0].path.name
        loaded = self.engine.components(name)
        by_class = {f"{type(each).__module__.split('.')[0]}.{type(each).__name__}": each for each in loaded}
        return {name: by_class[part.cls] for name, part in self.case.family.parts.items()}

    def plain(self) -> Callable[[int], bytes]:
        """The library's pipeline, which makes the picture of a seed as a webp, too."""
        family = self.case.family
        shipped = load_scheduler(family)
        scheduler = shipped if family.flow else EulerDiscreteScheduler.from_config(shipped.config)
        tokenizers = {name: load_tokenizer(each) for name, each in family.tokenizers.items()}
        components = family.assemble({**self.components(), **tokenizers, "scheduler": scheduler})
        pipeline = getattr(diffusers, str(family.pipelines.text))(**components, **family.fixed)
        pipeline.set_progress_bar_config(disable=True)

        def picture(seed: int) -> bytes:
            made = pipeline(
                words(seed),
                num_inference_steps=self.case.steps,
                width=self.case.side,
                height=self.case.side,
                generator=torch.Generator().manual_seed(seed),
                **self.case.called,
            )
            buffer = io.BytesIO()
            made.images[0].save(buffer, "WEBP", quality=90, method=0)
            return buffer.getvalue()

        return picture

    @contextmanager
    def evaluations(self) -> Iterator[list[int]]:
        """How many pictures the denoiser looks at inside, one number a call."""
        seen: list[int] = []

        def count(_module: Any, given: Sequence[Any], named: Mapping[str, Any]) -> None:
            seen.append(len(given[0] if given else next(iter(named.values()))))

        denoiser = self.components()[self.case.family.denoiser]
        handle = denoiser.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()


def bench(lab: Lab, name: str) -> Bench:
    """The model called ``name``, kept for the rows that follow."""
    found: Bench = lab.kept("bench", name, lambda: Bench(lab, name))
    return found


def _files(case: Case, folder: Path, device: str) -> tuple[tuple[LocalFile, ...], float]:
    """The files in ``folder``, and the seconds that writing them took, if they were not there yet."""
    done = folder / "done"
    if done.exists():
        lines = [line.split(" ", 1) for line in done.read_text(encoding="utf-8").splitlines()]
        return tuple(LocalFile(role, Path(path), path) for role, path in lines), 0.0  # type: ignore[arg-type]
    began = time.perf_counter()
    files = case.write(folder, Drawn(device))
    done.write_text("".join(f"{file.role} {file.path}\n" for file in files), encoding="utf-8")
    return files, time.perf_counter() - began


def words(seed: int) -> str:
    """Other words for every seed."""
    return f"{sample_model.prompt('red', 'potion', 'grass')} {seed}"


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
