"""Memory: what a picture needs, what stays loaded where, and what happens when it does not suffice.

The GPU's memory is faked by a number; components, pictures and RAM are real.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from studio_worker.box.device import Device
from studio_worker.engine import Inputs, Router
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.loading import load_part
from studio_worker.engine.memory.held import Held, Place
from studio_worker.engine.memory.machine import MachineMemory
from studio_worker.engine.memory.peaks import Peaks
from studio_worker.engine.memory.placement import Mode, Plan, Space, choose
from studio_worker.engine.memory.residency import Residency
from studio_worker.engine.parameters import resolve
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.estimate import Estimates
from studio_worker.engine.rendering.needs import footprint
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile, ModelSource
from tests.engine_lab import SAMPLE, SMALL, changed_sample, encoded, request, scene
from tests.lab.memory import (
    CPU,
    GIB,
    MIB,
    RAM,
    Fake,
    component,
    fail_to_decode,
    key,
    made,
    needs,
    plan_of,
    preloaded,
    sample_footprint,
)
from tests.played_gpu import played

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


# --- what a picture needs ---


@pytest.mark.parametrize(
    ("gib", "mode", "tiled"),
    [
        (18.0, Mode.WHOLE, False),
        (17.9, Mode.WHOLE, True),
        (15.9, Mode.COMPONENT, False),
        (10.9, Mode.LAYERS, False),
        (3.9, Mode.LAYERS, True),
    ],
)
def test_fastest_way_that_fits_is_taken(gib: float, mode: Mode, tiled: bool) -> None:
    """The whole model where it fits, else component by component, else layer by layer."""
    plan = choose(needs(), Space("cuda:0", int(gib * GIB), host=RAM), offload=False)
    assert (plan.mode, plan.tiled) == (mode, tiled)
    assert plan.peak_bytes <= gib * GIB


def test_picture_that_fits_in_no_way_is_refused_with_the_figures() -> None:
    """A picture for which there is no room fails before anything is loaded; another worker may try."""
    with pytest.raises(JobError, match=r"needs 2\.0 GiB and cuda:0 has 1\.5 GiB") as caught:
        choose(needs(), Space("cuda:0", int(1.5 * GIB), host=RAM), offload=False)
    assert caught.value.retryable
    with pytest.raises(JobError, match=r"needs 16\.0 GiB and cpu has 15\.0 GiB"):
        choose(needs(), Space("cpu", 15 * GIB, host=0), offload=False)


def test_model_that_asks_for_it_is_offloaded_however_much_fits() -> None:
    """offloadToCpu keeps a model's weights in RAM even where the device could hold them; not where RAM
    cannot.
    """
    assert choose(needs(), Space("d", 100 * GIB, host=RAM), offload=True).mode is Mode.COMPONENT
    for host in (0, 14 * GIB):
        assert choose(needs(), Space("cpu", 100 * GIB, host=host), offload=True).mode is Mode.WHOLE


def test_weights_that_ram_cannot_hold_do_not_wait_there() -> None:
    """Where neither the device nor RAM has room for a model's weights, the job fails with both figures,
    instead of the machine's running out of memory.
    """
    with pytest.raises(JobError, match=r"needs 16\.0 GiB and cuda:0 has 12\.0 GiB .* 15\.0 GiB .* 14\.0 GiB"):
        choose(needs(), Space("cuda:0", 12 * GIB, host=14 * GIB), offload=False)
    assert choose(needs(), Space("d", 12 * GIB, host=15 * GIB), offload=False).mode is Mode.COMPONENT


QUANTISED = {"transformer": 20 * GIB, "text_encoder": 8 * GIB}
"""What the components of ``needs`` take where their matrices are written out."""


@pytest.mark.parametrize(
    ("spare_gib", "unpacked"),
    [
        (32.0, {"transformer", "text_encoder"}),
        (31.9, {"transformer"}),
        (27.9, set()),
        (18.0, set()),
    ],
)
def test_free_memory_is_spent_on_unpacked_weights(spare_gib: float, unpacked: set[str]) -> None:
    """Quantised weights are unpacked where there is room for that, the denoiser's first; but no other model
    leaves the device for it.
    """
    needed = needs(unpacked=QUANTISED)
    plan = choose(needed, Space("cuda:0", 100 * GIB, RAM, int(spare_gib * GIB)), offload=False)
    assert (plan.mode, plan.tiled, plan.unpacked) == (Mode.WHOLE, False, unpacked)
    assert plan.peak_bytes - plan.working_bytes == needed.weight_bytes + sum(
        size - needed.weights[name] for name, size in QUANTISED.items() if name in unpacked
    )


def test_unpacked_weights_are_given_up_before_anything_else() -> None:
    """Packed weights come before tiles, which show, and before components that leave the device."""
    plans = needs(unpacked=QUANTISED).plans()
    assert [(plan.mode, plan.tiled, len(plan.unpacked)) for plan in plans[:5]] == [
        (Mode.WHOLE, False, 2),
        (Mode.WHOLE, False, 1),
        (Mode.WHOLE, False, 0),
        (Mode.WHOLE, True, 0),
        (Mode.COMPONENT, False, 0),
    ]
    assert all(not plan.unpacked for plan in plans[2:])


def test_need_is_known_from_the_headers() -> None:
    """Weights count as they are once loaded, and a larger picture needs more."""
    small, large = sample_footprint(), sample_footprint(1024 * 1024)
    engine = DiffusionEngine("cpu")
    made(engine)
    assert sum(small.weights.values()) == pytest.approx(
        engine.resident()["sample-model"].size_bytes, rel=0.01
    )
    assert large.decoding > 200 * small.decoding
    assert large.tile < large.decoding


class Card:
    """A GPU of 10 GiB as the driver and torch tell of it: what others have, and what this process's allocator
    has taken of the rest (``reserved``) and given out (``allocated``).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.others = self.reserved = self.allocated = 0
        total = 10 * GIB
        for asked, answer in {
            "mem_get_info": lambda device: (total - self.others - self.reserved, total),
            "memory_reserved": lambda device: self.reserved,
            "memory_allocated": lambda device: self.allocated,
            "get_device_properties": lambda device: SimpleNamespace(total_memory=total),
        }.items():
            monkeypatch.setattr(torch.cuda, asked, answer)

    def take(self, size_bytes: int) -> None:
        """What the allocator has is given out first, then more is taken from the driver."""
        self.allocated += size_bytes
        self.reserved = max(self.reserved, self.allocated)


def test_what_others_use_of_a_gpu_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """There for a job is what other processes leave, but for a twentieth of the card; whether this one has
    it already, for a model that could go or for nothing, is all the same.
    """
    card, memory = Card(monkeypatch), MachineMemory(torch.device("cuda:0"))
    assert memory.on_device(0) == 9.5 * GIB
    card.others = 3 * GIB
    assert memory.on_device(0) == 6.5 * GIB
    card.take(4 * GIB)  # a model
    assert memory.on_device(4 * GIB) == 6.5 * GIB
    card.take(2 * GIB)  # what a picture in hand takes beside it, and cannot let go
    assert memory.on_device(4 * GIB) == 4.5 * GIB
    card.allocated -= 2 * GIB  # it is made: the allocator keeps what it had
    assert memory.on_device(4 * GIB) == 6.5 * GIB
    card.allocated = 0
    assert memory.on_device(0) == 6.5 * GIB
    card.reserved, card.others = 0, 10 * GIB
    assert memory.on_device(0) == 0


def test_loaded_models_count_as_room_for_the_next_job() -> None:
    """What a job could have is the same before and after a model was loaded: it would leave for the job."""
    memory = Fake(3 * GIB)
    memory.on_device = lambda ours: 2 * GIB + ours  # type: ignore[method-assign]  # 2 GiB free
    router = Router({"sd-cpp": lambda: DiffusionEngine("cpu", memory=memory)})
    assert router.available_bytes() is None
    router.for_source(ModelSource(engine="sd-cpp")).generate(request(), lambda *_: None, Cancel())
    assert router.available_bytes() == 2 * GIB + router.resident()["sample-model"].size_bytes


# --- what stays where ---


def test_component_leaves_for_ram_and_then_altogether() -> None:
    """The one used longest ago leaves the device first, for RAM where there is room, else it is dropped."""
    residency = Residency(CPU, Fake(device=3072, host=2048))
    for name in "abc":
        residency.make_room(1024)
        residency.add(key(name), component(1))
        residency.name(name, [key(name)])
    residency.get(key("a"))
    residency.make_room(2048)  # b and c are older than a
    assert [residency.place(key(name)) for name in "abc"] == [Place.DEVICE, Place.RAM, Place.RAM]
    assert {n: found.place for n, found in residency.models.items()} == {
        "a": "device",
        "b": "ram",
        "c": "ram",
    }
    residency.add(key("d"), component(2))
    residency.make_room(2048, keep=[key("d")])  # a to RAM, where b has waited longest
    assert [residency.place(key(name)) for name in "abcd"] == [Place.RAM, None, Place.RAM, Place.DEVICE]
    assert residency.get(key("c")) is not None
    assert residency.place(key("c")) is Place.DEVICE
    residency.clear()
    assert residency.models == {}


def test_component_too_large_for_ram_leaves_the_others_there() -> None:
    """A component that RAM could never hold is dropped; those that wait there go on waiting."""
    residency = Residency(CPU, Fake(device=8192, host=3072))
    for name in "ab":
        residency.add(key(name), component(1), Place.RAM)
    residency.add(key("large"), component(4))
    residency.make_room(8192)
    assert [residency.place(key(name)) for name in ("a", "b", "large")] == [Place.RAM, Place.RAM, None]


def test_room_in_ram_that_is_kept_is_not_counted_on() -> None:
    """Components that a job needs in RAM stay there, and others do not leave in vain for what still would not
    fit beside them.
    """
    residency = Residency(CPU, Fake(device=8192, host=4096))
    for name, size in (("other", 1), ("needed", 2)):
        residency.add(key(name), component(size), Place.RAM)
    residency.add(key("leaves"), component(3))
    residency.make_room(8192, keep=[key("needed")])
    assert [residency.place(key(name)) for name in ("other", "needed", "leaves")] == [
        Place.RAM,
        Place.RAM,
        None,
    ]


def test_components_that_come_to_ram_anyway_get_what_there_is() -> None:
    """What a job needs in RAM goes before everything that waits there, also where that does not suffice; what
    has left is no longer said to be there.
    """
    residency = Residency(CPU, Fake(device=8192, host=3072))
    for name in "ab":
        residency.add(key(name), component(1), Place.RAM)
        residency.name(name, [key(name)])
    residency.make_host_room(2048, keep=[key("b")])
    assert residency.models.keys() == {"b"}
    residency.make_host_room(8192, keep=[])
    assert residency.models == {}


def test_component_is_dropped_where_ram_is_the_device() -> None:
    """On a CPU worker there is no second place: what leaves is dropped."""
    memory = Fake(device=1024)
    memory.has_host = False
    residency = Residency(CPU, memory)
    residency.add(key("a"), component(1))
    residency.make_room(512)
    assert residency.place(key("a")) is None


def test_room_is_made_for_the_picture_too() -> None:
    """What the picture takes while it is made counts beside the weights."""
    residency = Residency(CPU, Fake(device=4096))
    residency.add(key("a"), component(2))
    residency.make_room(1024, working_bytes=1024)
    assert residency.place(key("a")) is Place.DEVICE
    residency.make_room(1024, working_bytes=2048)
    assert residency.place(key("a")) is Place.RAM


def test_released_components_wait_in_ram_the_last_used_first() -> None:
    """All leave the device; where RAM has not room for all, those used last stay."""
    residency = Residency(CPU, Fake(device=8192, host=3072))
    residency.add(key("waits"), component(2), Place.RAM)
    for name in "abc":
        residency.add(key(name), component(1))
    residency.release()
    assert [residency.place(key(name)) for name in "abc"] == [Place.RAM] * 3
    assert residency.place(key("waits")) is None
    residency.add(key("d"), component(1))
    residency.release()
    assert [residency.place(key(name)) for name in "abcd"] == [None, Place.RAM, Place.RAM, Place.RAM]


@pytest.mark.parametrize("has_host", [True, False])
def test_released_model_makes_the_same_picture(has_host: bool) -> None:
    """A released model is off the device, and its next picture is the same."""
    memory = Fake(GIB)
    memory.has_host = has_host
    engine = DiffusionEngine("cpu", memory=memory)
    engine.release()
    first = made(engine)
    engine.release()
    assert [found.place for found in engine.resident().values()] == (["ram"] if has_host else [])
    assert engine._residency.size_bytes() == 0
    assert made(engine).data == first.data


def test_models_that_ram_cannot_take_after_all_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where RAM is full when the models are to leave the GPU, they go altogether: that ends nothing."""
    engine = DiffusionEngine("cpu", memory=Fake(GIB))
    first = made(engine)

    def full(*_: Any) -> NoReturn:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(Held, "move", full)
        engine.release()
    assert engine.resident() == {}
    assert made(engine).data == first.data


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
from tests.engine_lab import request

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


# --- before the first job ---


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


# --- before a job is accepted ---


def test_estimate_is_told_without_torch() -> None:
    """What a job needs is known in a process that has not loaded torch, and grows with the picture."""
    script = """
import sys
from studio_worker import sample_model
from studio_worker.box.device import Device
from studio_worker.engine.rendering.estimate import Estimates
from studio_worker.jobs import ImageTask
from studio_worker.models import CliDefaults, LocalFile
file = LocalFile("model", sample_model.WEIGHTS, sample_model.SHA256)
told = Estimates(Device("cpu", "", 8.0))
for side in (64, 2048, 9000):
    print(told.needed_bytes([file], ImageTask(prompt="", width=side, height=side), CliDefaults()))
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    small, large, impossible = done.stdout.split()
    assert 15 * MIB < int(small) < 64 * MIB
    assert GIB < int(large) < 2 * GIB
    assert impossible == "None"  # the job itself says what is wrong with it


@pytest.mark.parametrize("kind", ["text", "mask", "lora", "unguided"])
def test_picture_is_made_with_what_its_offer_was_estimated_at(kind: str, tmp_path: Path) -> None:
    """What is estimated for an offer is what the engine then wants to have: with less it makes nothing."""
    files: tuple[LocalFile, ...] = (SAMPLE,)
    if kind == "lora":
        layer, path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", tmp_path / "lora"
        factors = {"lora_A": torch.ones(4, 104), "lora_B": torch.ones(104, 4)}
        save_file({f"{layer}.{name}.weight": factor for name, factor in factors.items()}, path)
        files = (SAMPLE, LocalFile("lora", path, "l"))
    inputs = Inputs(encoded(scene()), encoded(scene())) if kind == "mask" else Inputs()
    asked = request(files=files, inputs=inputs, cfg_scale=1.0 if kind == "unguided" else 4.0, width=128)
    needed = Estimates(Device("cpu", "", 8.0)).needed_bytes(files, asked.task, SMALL)
    assert needed is not None
    for size_bytes in (needed - 1, needed):
        memory = Fake(size_bytes)
        memory.has_host = False
        engine = DiffusionEngine("cpu", memory=memory)
        with pytest.raises(JobError, match="the picture needs") if size_bytes < needed else nullcontext():
            assert engine.generate(asked, lambda done, total: None, Cancel()).data


def test_estimate_counts_on_ram_only_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a picture is estimated to be made in the leanest way, layer by layer, so that small cards
    work, too; as a whole where the machine's RAM is smaller than the weights, so that no offer is accepted
    for what cannot be done.
    """

    device = Device("cuda:0", "NVIDIA L4", 24.0, (8, 9))

    def needed() -> int | None:
        return Estimates(device).needed_bytes([SAMPLE], request().task, SMALL)

    plans = {
        plan.mode: plan.peak_bytes
        for plan in reversed(footprint(identify([SAMPLE]), "float16", 64 * 64).plans())
    }
    assert needed() == plans[Mode.LAYERS] < plans[Mode.COMPONENT]
    monkeypatch.setattr("studio_worker.engine.rendering.estimate.total_ram_bytes", lambda: 4 * MIB)
    assert needed() == plans[Mode.WHOLE] > plans[Mode.COMPONENT]
