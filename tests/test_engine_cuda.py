"""The engine on a GPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.memory import free_bytes
from studio_worker.engine.samplers import SAMPLERS
from studio_worker.errors import DeviceError
from studio_worker.jobs import Cancel
from tests.engine_lab import decoded, encoded, request, scene

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]


def ignore(_done: int, _total: int) -> None:
    """A progress callback for tests of something else."""


@pytest.fixture(scope="module")
def engine() -> DiffusionEngine:
    return DiffusionEngine("cuda")


@pytest.fixture(scope="module")
def reference() -> DiffusionEngine:
    return DiffusionEngine("cpu")


@pytest.mark.parametrize("kind", ["text", "picture", "mask"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gpu_makes_the_cpus_picture(
    engine: DiffusionEngine, reference: DiffusionEngine, sampler: str, kind: str
) -> None:
    """On a GPU the same seed gives the CPU's picture, but for half precision."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    inputs = {
        "text": Inputs(),
        "picture": Inputs(encoded(scene())),
        "mask": Inputs(encoded(scene()), encoded(mask)),
    }[kind]
    asked = request(sampling_method=sampler, inputs=inputs)
    found, expected = (made.generate(asked, ignore, Cancel()) for made in (engine, reference))
    difference = np.asarray(decoded(found.data), int) - np.asarray(decoded(expected.data), int)
    assert np.abs(difference).mean() < 2
    assert (found.meta["device"], found.meta["dtype"]) == ("cuda:0", "float16")


def test_memory_comes_back(engine: DiffusionEngine) -> None:
    """Pictures one after another leave no memory behind on the GPU."""
    engine.generate(request(), ignore, Cancel())
    before = free_bytes(torch.device("cuda", 0))
    for seed in range(5):
        engine.generate(request(seed=seed), ignore, Cancel())
    assert free_bytes(torch.device("cuda", 0)) >= before - 2**20


def test_gpu_that_is_not_there_is_an_error() -> None:
    """A GPU number that the machine does not have is an error that counts those it has."""
    with pytest.raises(DeviceError, match=r"there is no cuda:99: .* has \d+"):
        DiffusionEngine("cuda:99")
