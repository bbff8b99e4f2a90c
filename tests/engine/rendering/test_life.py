"""Slow is not hung: signs of life while a model comes from a slow disk, and in one pass on a slow machine.

The clock is faked: every tensor read and every layer passed takes 100 s, and a step may take 150 s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.files import weights as reading
from studio_worker.engine.rendering import loader as loading
from studio_worker.errors import JobCancelled
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.jobs import Cancel, ImageTask, Job
from studio_worker.models import CliDefaults, LocalFile, ModelSource
from studio_worker.work.worker import Worker
from tests.fakes.played import NoFiles
from tests.lab.engine import encoded, request, scene
from tests.lab.worker import Source, make

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

TENSOR_S = LAYER_S = 100.0
STEP_TIMEOUT_S = 150.0
FAMILY_NAMES = ("sd1", "qwen-image", "flux1-dev")
"""Of three kinds of VAE, and of text encoder."""


class SlowMachine:
    """A clock that reading and computing turn, and what the watchdog would have said at each turn."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[float] = []
        self.is_stuck: Callable[[], bool] = lambda: False
        self.stuck_at: list[int] = []

    def take(self, seconds: float) -> None:
        self.now += seconds
        self.turns.append(seconds)
        if self.is_stuck():
            self.stuck_at.append(len(self.turns))

    def slow_down(self, module: torch.nn.Module) -> None:
        """Every layer of ``module`` takes its time."""
        for each in module.modules():
            if not list(each.children()):
                each.forward = self._slowly(each.forward)  # type: ignore[method-assign]

    def _slowly(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*given: Any, **named: Any) -> Any:
            self.take(LAYER_S)
            return forward(*given, **named)

        return slow


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SlowMachine:
    made = SlowMachine()
    for module in ("lane", "stride"):
        clock = SimpleNamespace(monotonic=lambda: made.now)
        monkeypatch.setattr(f"studio_worker.work.{module}.time", clock)
    is_mapped, load_part, open_file = reading.dequantised, loading.load_part, reading.open_safetensors

    class SlowFile:
        """A safetensors file on a slow disk."""

        def __init__(self, *given: Any, **named: Any) -> None:
            self._opened = open_file(*given, **named)

        def __enter__(self) -> SlowFile:
            self._file = self._opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._opened.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            made.take(TENSOR_S)
            tensor: torch.Tensor = self._file.get_tensor(name)
            return tensor

    def copied(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        made.take(TENSOR_S)
        return is_mapped(tensor, dtype)

    def loaded(part: Any, *given: Any, **named: Any) -> torch.nn.Module:
        component = load_part(part, *given, **named)
        if "Transformer2D" not in part.cls and "UNet" not in part.cls:
            made.slow_down(component)
        return component

    monkeypatch.setattr(reading, "open_safetensors", SlowFile)
    monkeypatch.setattr("studio_worker.engine.loading.dequantised", copied)
    monkeypatch.setattr(loading, "load_part", loaded)
    return made


def box(folder: Path, machine: SlowMachine, name: str, inputs: Inputs = Inputs()) -> tuple[Worker, Source]:  # noqa: B008
    """A worker with one job for a tiny model of the family ``name``."""
    model = tiny(name, folder / "model", width=32)
    files = model.files()
    url = None if inputs.init_image is None else "https://studio/picture"
    task = ImageTask(prompt="a castle", seed=1, ext="png", init_image_url=url, denoise=0.9)
    defaults = CliDefaults(width=64, height=64, steps=2, cfg_scale=1.0)
    source = Source(Job("j", "m", task, ModelSource(engine="scripted", cli_defaults=defaults)))
    worker, _, _ = make(
        folder,
        source,
        files=Present(files),
        fetch=lambda url, cancel: inputs.init_image or b"",
        step_timeout_s=lambda: STEP_TIMEOUT_S,
        make_engine=lambda: DiffusionEngine("cpu", families=(model.family,)),
    )
    machine.is_stuck = worker.is_stuck
    return worker, source


class Present(NoFiles):
    """A store that has these files."""

    def __init__(self, files: tuple[LocalFile, ...]) -> None:
        super().__init__()
        self._files = files

    def taken(self, *_: Any, **__: Any) -> Any:
        return nullcontext(self._files)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_slow_job_is_not_taken_for_hung(tmp_path: Path, machine: SlowMachine, name: str) -> None:
    """However long a model takes to come, and a picture to be read and shown, a job that goes on is not
    stuck: there is a sign of life for each tensor and each layer.
    """
    worker, source = box(tmp_path, machine, name, Inputs(init_image=encoded(scene())))
    worker.run()
    assert source.failures == []
    assert machine.now > 20 * STEP_TIMEOUT_S
    assert machine.stuck_at == []


def test_one_tensor_that_never_comes_is(tmp_path: Path, machine: SlowMachine) -> None:
    """A disk that gives nothing for longer than a step may take is told."""
    worker, _ = box(tmp_path, machine, "sd1")
    plain = machine.take

    def hang_once(seconds: float) -> None:
        plain(2 * STEP_TIMEOUT_S if len(machine.turns) == 20 else seconds)

    machine.take = hang_once  # type: ignore[method-assign]
    worker.run()
    assert machine.stuck_at == [21]


def test_job_is_stopped_between_two_tensors(tmp_path: Path, machine: SlowMachine) -> None:
    """Told to hand its job back, a worker does so after the tensor at hand, not after the model."""
    worker, source = box(tmp_path, machine, "sd1")
    plain = machine.take

    def stop_then(seconds: float) -> None:
        plain(seconds)
        if len(machine.turns) == 20:
            worker.hand_back("the worker is stopping")

    machine.take = stop_then  # type: ignore[method-assign]
    worker.run()
    assert source.failures == [("j", "the worker is stopping", True)]
    assert len(machine.turns) == 20


def test_job_is_stopped_while_its_picture_is_shown() -> None:
    """The same between two layers of the VAE, after the last step; the next picture is as any other."""
    engine, cancel = DiffusionEngine("cpu"), Cancel()
    expected = engine.generate(request(), lambda done, total: None, Cancel()).data
    last: list[int] = []

    def progress(done: int, total: int) -> None:
        if last == [total] and done == 0:
            cancel.set("enough")
        last[:] = [done or last[0] if last else done]

    with pytest.raises(JobCancelled, match="enough"):
        engine.generate(request(), progress, cancel)
    assert engine.generate(request(), lambda done, total: None, Cancel()).data == expected
