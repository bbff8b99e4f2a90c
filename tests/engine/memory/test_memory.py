"""Pictures on a device that is too small for them, and what happens when memory runs out.

The GPU's memory is faked by a number; components, pictures and RAM are real.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio_worker.box.device import Device
from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.loading import load_part
from studio_worker.engine.memory.peaks import Peaks
from studio_worker.engine.memory.placement import Mode, Plan
from studio_worker.engine.parameters import resolve
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.estimate import Estimates
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults
from tests.fakes.played_gpu import played
from tests.lab.engine import SAMPLE, SMALL, changed_sample, encoded, request, scene
from tests.lab.memory import (
    CPU,
    GIB,
    MIB,
    Fake,
    fail_to_decode,
    made,
    plan_of,
    preloaded,
    sample_footprint,
)

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


# --- pictures on a device that is too small ---


@pytest.mark.parametrize("kind", ["text", "mask"])
@pytest.mark.parametrize("mode", [Mode.COMPONENT, Mode.LAYERS])
def test_offloaded_picture_is_the_same(mode: Mode, kind: str) -> None:
    """Component by component or layer by layer, the picture is that of the whole model, pixel for pixel."""
    inputs = Inputs() if kind == "text" else Inputs(encoded(scene()), encoded(scene()))
    # By the figures a model as small as this is never offloaded component by component.
    is_asked = mode is Mode.COMPONENT
    defaults = SMALL.model_copy(update={"offload_to_cpu": is_asked})
    memory = Fake(GIB if is_asked else plan_of(mode, tiled=False).peak_bytes)
    engine = DiffusionEngine("cpu", memory=memory)
    picture = made(engine, inputs=inputs, defaults=defaults)
    assert picture.meta["offload"] == mode.value
    assert picture.data == made(DiffusionEngine("cpu"), inputs=inputs).data
    again = made(engine, inputs=inputs, defaults=defaults)
    assert again.data == picture.data
    assert again.timings_s["load"] == 0  # it waits in RAM


@pytest.mark.parametrize(("share", "offload"), [(1.0, "layers"), (0.01, "layers"), (0.0, None), (-1.0, None)])
def test_picture_is_planned_within_what_its_source_allows(share: float, offload: str | None) -> None:
    """maxVramGib bounds what a model takes of a device that has more; where no way is as lean, the leanest is
    taken, and 0 or less bounds nothing, as in stable-diffusion.cpp. The picture is the same.
    """
    allowed = share * plan_of(Mode.LAYERS, tiled=False).peak_bytes / GIB
    said = SMALL.model_dump(by_alias=True) | {"maxVramGib": allowed, "mmap": True}
    engine = DiffusionEngine("cpu", memory=Fake(GIB))
    picture = made(engine, defaults=CliDefaults.model_validate(said), seed=3)
    assert picture.meta.get("offload") == offload
    if not picture.meta.get("tiledVae"):
        assert picture.data == made(DiffusionEngine("cpu"), seed=3).data


def test_source_that_allows_more_than_there_is_changes_nothing() -> None:
    """maxVramGib is no promise: what the device has not is not planned with."""
    defaults = SMALL.model_copy(update={"max_vram_gib": 100.0})
    memory = Fake(plan_of(Mode.LAYERS, tiled=False).peak_bytes)
    assert made(DiffusionEngine("cpu", memory=memory), defaults=defaults).meta["offload"] == "layers"
    with pytest.raises(JobError, match="device with more memory"):
        made(DiffusionEngine("cpu", memory=Fake(MIB)), defaults=defaults)


def test_offload_leaves_no_trace() -> None:
    """After a job with offload, the same components make the same picture as a whole."""
    memory = Fake(plan_of(Mode.LAYERS, tiled=False).peak_bytes)
    engine = DiffusionEngine("cpu", memory=memory)
    first = made(engine)
    memory.device = GIB
    second = made(engine)
    assert "offload" not in second.meta
    assert second.data == first.data


def test_tiled_picture_is_nearly_the_same() -> None:
    """Decoded in tiles a picture differs by no more than faint seams, and says so."""
    blueprint = identify([SAMPLE])
    family = blueprint.family
    parts = {
        name: load_part(part, blueprint.sections[name], CPU, torch.float32)
        for name, part in family.parts.items()
    }
    asked = request(width=256, height=256, steps=6)  # with fewer it is noise, of which tiles make much
    parameters = resolve(asked.task, asked.defaults, family.defaults, from_image=False)
    whole, tiled = (
        LoadedModel(family, parts, Plan(Mode.WHOLE, tiled=is_tiled, peak_bytes=0)).render(
            parameters, Starting(), lambda done, total: None, Cancel()
        )
        for is_tiled in (False, True)
    )
    assert (whole.facts.get("tiledVae"), tiled.facts["tiledVae"]) == (None, True)
    difference = np.abs(np.asarray(whole.picture, int) - np.asarray(tiled.picture, int))
    assert 0 < difference.mean() < 8
    assert not parts["vae"].use_tiling  # the next picture is not


def test_model_waits_in_ram_for_its_next_job(tmp_path: Path) -> None:
    """On a device with room for one model, two take turns without being read from disk again."""
    other = changed_sample(tmp_path / "other.safetensors", lambda tensors: None)
    mine = changed_sample(tmp_path / "mine.safetensors", lambda tensors: None)
    engine = DiffusionEngine("cpu", memory=Fake(plan_of(Mode.WHOLE, tiled=False).peak_bytes))
    first = made(engine, mine)
    made(engine, other)
    # Whoever reads it again makes no picture.
    changed_sample(mine.path, lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()])
    assert made(engine, mine).data == first.data


# --- out of memory ---


def test_out_of_memory_is_tried_once_more_in_a_leaner_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture for which memory ran out is made in a way that needs less; it is the same picture."""
    expected = made(DiffusionEngine("cpu"))
    fail_to_decode(monkeypatch, 1)
    picture = made(DiffusionEngine("cpu", memory=Fake(GIB)))
    assert picture.meta["offload"] == "component"
    assert picture.data == expected.data


def test_memory_that_ran_out_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next picture of that model and size, or a larger one, is made in the leaner way at once; a smaller
    one as before.
    """
    engine = DiffusionEngine("cpu", memory=Fake(GIB))
    tries = fail_to_decode(monkeypatch, 1)
    assert made(engine, width=128, height=128).meta["tiledVae"]
    tries.clear()
    assert made(engine, width=128, height=128).meta["tiledVae"]
    assert made(engine, width=128, height=192).meta["tiledVae"]
    assert "tiledVae" not in made(engine).meta
    assert len(tries) == 3


def test_memory_that_pictures_took_is_remembered() -> None:
    """A picture that took more than was estimated, but had it, is planned with that where there is less."""
    memory = Fake(GIB)
    engine = DiffusionEngine("cpu", memory=memory)
    memory.most = 800 * MIB
    assert "offload" not in made(engine).meta
    memory.device = 700 * MIB
    assert made(engine).meta["offload"] == "component"


def test_offer_is_judged_by_what_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a picture could not be made with is not counted on for the next offer of that model and size."""
    peaks, device = Peaks(), Device("cpu", "", 8.0)
    memory = Fake(GIB)
    memory.has_host = False
    engine = DiffusionEngine("cpu", memory=memory, peaks=peaks)

    def needed(**size: int) -> int:
        found = Estimates(device, peaks).needed_bytes([SAMPLE], request(**size).task, SMALL)
        assert found is not None
        return found

    before = needed()
    fail_to_decode(monkeypatch, 9)
    with pytest.raises(JobError):
        made(engine, width=128, height=128)
    assert before < 64 * MIB
    assert needed(width=128, height=128) > GIB
    assert needed() == before


def test_one_that_ran_out_leaves_other_models_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory that runs out for one model's picture unloads no other, as long as a leaner way suffices."""
    other = changed_sample(tmp_path / "other.safetensors", lambda tensors: None)
    engine = DiffusionEngine("cpu", memory=Fake(GIB))
    assert preloaded(engine, other)
    fail_to_decode(monkeypatch, 1)
    made(engine)
    assert {name: found.place for name, found in engine.resident().items()} == {
        "other": "device",
        "sample-model": "ram",
    }


def test_others_leave_the_device_before_a_picture_is_made_in_a_leaner_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where a picture has more without the other models, it is tried so; they wait in RAM meanwhile."""
    other = changed_sample(tmp_path / "other.safetensors", lambda tensors: None)
    device = int(2.8 * sample_footprint().weight_bytes)
    engine = DiffusionEngine("cpu", memory=Fake(device))
    assert preloaded(engine, other)
    fail_to_decode(monkeypatch, 1)
    assert "offload" not in made(engine).meta
    places = {name: found.place for name, found in engine.resident().items()}
    assert places["sample-model"] == "device"
    assert places["other"].endswith("ram")


def test_ram_that_ran_out_is_freed_of_other_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it was RAM that ran out, other models leave it, and the picture is made as it was planned."""
    other = changed_sample(tmp_path / "other.safetensors", lambda tensors: None)
    load, left = load_part, iter([1])

    def full(*args: Any) -> torch.nn.Module:
        if next(left, None):
            raise MemoryError
        return load(*args)

    with played("cuda:1") as gpu:
        engine = DiffusionEngine(str(gpu.device), memory=Fake(GIB))
        assert preloaded(engine, other)
        engine.release()
        monkeypatch.setattr("studio_worker.engine.rendering.loader.load_part", full)
        assert "offload" not in made(engine).meta
        assert engine.resident().keys() == {"sample-model"}


def test_everything_leaves_before_a_job_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the leanest way does not suffice, it is tried once more without any other model anywhere."""
    other = changed_sample(tmp_path / "other.safetensors", lambda tensors: None)
    engine = DiffusionEngine("cpu", memory=Fake(plan_of(Mode.LAYERS, tiled=False).peak_bytes))
    assert preloaded(engine, other)
    tries = fail_to_decode(monkeypatch, 1)
    assert made(engine).meta["offload"] == "layers"
    assert engine.resident().keys() == {"sample-model"}
    assert len(tries) == 2


def test_out_of_memory_in_every_way_fails_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing helps, the job fails so that another worker may try; a smaller one is made."""
    engine = DiffusionEngine("cpu", memory=Fake(GIB))
    tries = fail_to_decode(monkeypatch, 3)
    with pytest.raises(JobError, match=r"out of memory on cpu: [\d.]+ of [\d.]+ GiB free") as caught:
        made(engine, width=128, height=128)
    assert caught.value.retryable
    assert len(tries) == 3
    assert engine.resident() == {}
    assert made(engine).data


CHILD = """
import hashlib, json, resource, sys
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from tests.lab.engine import request

def rss_mib():
    return int(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0]) / 1024

def small():
    made = engine.generate(request(), lambda done, total: None, Cancel())
    return hashlib.sha256(made.data).hexdigest()

engine = DiffusionEngine("cpu")
said = {"before": small(), "rss_before": rss_mib()}
used = int(open("/proc/self/status").read().partition("VmSize:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, -1))
try:
    engine.generate(request(width=2048, height=2048, steps=1), lambda done, total: None, Cancel())
except JobError as error:
    said |= {"error": str(error), "retryable": error.retryable}
said |= {"after": small(), "rss_after": rss_mib()}
print(json.dumps(said))
"""


def test_process_is_as_good_as_new_after_memory_ran_out() -> None:
    """When the system really refuses memory, the job fails with figures; the next small picture is the one
    that the process made when it was new, and the process is no larger than then.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    said = json.loads(done.stdout)
    assert "out of memory on cpu" in said["error"]
    assert said["retryable"]
    assert said["after"] == said["before"]
    assert said["rss_after"] < said["rss_before"] + 50
