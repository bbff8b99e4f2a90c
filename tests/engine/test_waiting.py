"""A GPU works ahead of the CPU while a picture is made: no step waits for it. The GPU is played by a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from studio_worker.engine import Inputs, Request
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import FAMILIES
from studio_worker.engine.sampling.samplers import SAMPLERS
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests.fakes.played_gpu import PlayedGpu, played
from tests.lab.engine import encoded, request, scene
from tests.lab.memory import GIB, Fake
from tests.lab.quantising import WRITERS, written

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIDE = 64
STEPS = 4
DEFAULTS = CliDefaults(width=SIDE, height=SIDE, steps=STEPS, cfg_scale=1.0)
SERVED = {family.name: family for family in FAMILIES if family.name != "sample"}

_INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_ASKING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}
"""Operations whose result the CPU must know: a number, or how large a tensor is."""


class Waits(TorchFunctionMode):
    """Counts what would keep the CPU waiting for the device, from the first step's end to the last's."""

    def __init__(self, gpu: PlayedGpu) -> None:
        super().__init__()
        self._gpu = gpu
        self._pinned: set[int] = set()
        self._is_on = False
        self.found: Counter[str] = Counter()

    def progress(self, done: int, total: int) -> None:
        """As of an engine."""
        self._is_on = 0 < done < total

    def note(self, what: str) -> None:
        if self._is_on and not self._gpu.is_aside:
            self.found[what] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            made = func(*args, **named)
            self._pinned.add(id(made))
            return made
        before = len(self._gpu.to_device) + len(self._gpu.to_ram)
        made = func(*args, **named)
        if len(self._gpu.to_device) + len(self._gpu.to_ram) > before:
            is_pinned = bool(args) and id(args[0]) in self._pinned
            if not (named.get("non_blocking") and is_pinned):
                self.note(f"a copy by {name}")
        elif name in {"tensor", "as_tensor"} and torch.device(named.get("device") or "cpu").type == "cuda":
            self.note(f"a copy by torch.{name}")
        return made


class Operations(TorchDispatchMode):
    """The same, within operations."""

    def __init__(self, gpu: PlayedGpu, waits: Waits) -> None:
        super().__init__()
        self._gpu, self._waits = gpu, waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in _ASKING and any(isinstance(each, torch.Tensor) and self._gpu.has(each) for each in args):
            self._waits.note(name)
        if name in _INDEXING and any(
            each is not None and each.dtype == torch.bool and self._gpu.has(each) for each in args[1]
        ):
            self._waits.note(f"{name} by truths")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tiny, tuple[LocalFile, ...]]]:
    made = {name: tiny(name, tmp_path_factory.mktemp(name), width=32) for name in SERVED}
    return {name: (each, each.files()) for name, each in made.items()}


def jobs(name: str) -> dict[str, dict[str, Any]]:
    """What a family can be asked for, by what it is called."""
    start = encoded(scene(SIDE, SIDE))
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    pipelines = SERVED[name].pipelines
    asked = {
        "text": {},
        "image": {"inputs": Inputs(start), "denoise": 0.9},
        "inpaint": {"inputs": Inputs(start, encoded(mask)), "denoise": 0.9},
        "edit": {"inputs": Inputs(ref_image=start)},
    }
    return {kind: job for kind, job in asked.items() if getattr(pipelines, kind)}


def waits_of(engine: DiffusionEngine, asked: Request, gpu: PlayedGpu) -> Counter[str]:
    waits = Waits(gpu)
    with waits, Operations(gpu, waits):
        engine.generate(asked, waits.progress, Cancel())
    return waits.found


LIBRARYS = {("qwen-image-edit-2511", "edit"): {"a copy by torch.tensor"}}
"""diffusers writes down anew for each evaluation which tokens are the reference's, and has no way to be given
that (QwenImageTransformer2DModel, ``modulate_index``)."""

EVERY_SAMPLER = {"sd1", "z-image"}
"""Families tried with all samplers, which know no family; the others with the one that draws most noise."""


@pytest.mark.parametrize("name", SERVED)
def test_no_step_waits_for_the_device(
    name: str, tinies: dict[str, tuple[Tiny, tuple[LocalFile, ...]]]
) -> None:
    """Whatever family, sampler and kind of job: between the first step and the last the CPU asks the GPU for
    nothing, be it for progress, cancelling or a look at the numbers, so that it always has work.
    """
    model, files = tinies[name]
    guided = 1.0 if "fill" in name else 2.0
    with played("cuda:1") as gpu:
        engine = DiffusionEngine("cuda:1", families=(model.family,), memory=Fake(GIB))
        for kind, job in jobs(name).items():
            for sampler in SAMPLERS if name in EVERY_SAMPLER else ["euler_a"]:
                asked = request(
                    files=files, defaults=DEFAULTS, sampling_method=sampler, cfg_scale=guided, **job
                )
                found = waits_of(engine, asked, gpu)
                assert found.keys() == LIBRARYS.get((name, kind), set()), (kind, sampler)


@pytest.mark.parametrize("form", WRITERS)
def test_packed_weights_keep_no_step_waiting(form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nor do weights wait that are multiplied out at each step, in whatever quantisation they are."""
    model = tiny("z-image", tmp_path_factory.mktemp("wide"))
    with played("cuda:1") as gpu:
        engine = DiffusionEngine("cuda:1", families=(model.family,), memory=Fake(GIB, host=0))
        asked = request(files=written(model, form), defaults=DEFAULTS)
        found = waits_of(engine, asked, gpu)
        assert not any(each.is_unpacked for each in engine.resident().values())
    assert not found
