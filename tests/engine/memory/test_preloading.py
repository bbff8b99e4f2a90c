"""Models that are loaded before their first job."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.memory.placement import Mode
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from tests.lab.engine import SAMPLE, changed_sample, request
from tests.lab.memory import (
    GIB,
    Fake,
    made,
    plan_of,
    preloaded,
    sample_footprint,
)

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def test_preloaded_model_needs_no_loading() -> None:
    """The first job of a preloaded model waits for nothing."""
    engine = DiffusionEngine("cpu")
    assert preloaded(engine, SAMPLE)
    assert list(engine.resident()) == ["sample"]
    assert made(engine).timings_s["load"] == 0


def test_preloading_ends_between_two_components() -> None:
    """When something more urgent comes, the component at hand is finished and kept, and no other begun."""
    engine = DiffusionEngine("cpu")
    assert not preloaded(engine, SAMPLE, times=1)
    assert engine.resident() == {}
    assert 0 < engine._residency.size_bytes() < sum(sample_footprint().weights.values())
    assert made(engine).data == made(DiffusionEngine("cpu")).data


def test_loading_tells_of_each_component() -> None:
    """A job that loads from a slow disk shows progress before its first step, and counts its steps once."""
    told: list[int] = []
    DiffusionEngine("cpu").generate(request(files=(SAMPLE,)), lambda done, total: told.append(done), Cancel())
    assert told.index(1) > len(sample_footprint().weights)
    steps = [step for step in told if step]
    assert steps == list(range(1, len(steps) + 1))


def test_preloading_pushes_nothing_out(tmp_path: Path) -> None:
    """A model that does not fit beside those that are loaded is not preloaded."""
    engine = DiffusionEngine("cpu", memory=Fake(plan_of(Mode.WHOLE, tiled=False).peak_bytes))
    assert preloaded(engine, SAMPLE)
    assert not preloaded(engine, changed_sample(tmp_path / "other.safetensors", lambda tensors: None))
    assert engine.resident().keys() == {"sample"}


def test_preloading_that_runs_out_of_memory_leaves_others_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model for which there is less memory than it seemed takes none of those with it that were preloaded
    before.
    """
    engine = DiffusionEngine("cpu", memory=Fake(GIB))
    assert preloaded(engine, SAMPLE)

    def full(*_: Any) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("studio_worker.engine.rendering.loader.load_part", full)
    with pytest.raises(JobError, match="out of memory"):
        preloaded(engine, changed_sample(tmp_path / "other.safetensors", lambda tensors: None))
    assert engine.resident().keys() == {"sample"}


def test_preloading_goes_on_where_it_ended() -> None:
    """What is loaded of a model counts once, so that one which just fits is finished the next time."""
    engine = DiffusionEngine("cpu", memory=Fake(plan_of(Mode.WHOLE, tiled=False).peak_bytes))
    assert not preloaded(engine, SAMPLE, times=1)
    assert preloaded(engine, SAMPLE)


def test_preloading_pushes_nothing_out_of_ram(tmp_path: Path) -> None:
    """Nor is one that would wait in RAM, where others wait already and there is no room for both."""
    layers = plan_of(Mode.LAYERS, tiled=False).peak_bytes
    engine = DiffusionEngine(
        "cpu", memory=Fake(layers, host=int(1.5 * sum(sample_footprint().weights.values())))
    )
    assert preloaded(engine, SAMPLE)
    assert [found.place for found in engine.resident().values()] == ["ram"]
    assert not preloaded(engine, changed_sample(tmp_path / "other.safetensors", lambda tensors: None))
    assert engine.resident().keys() == {"sample"}
