"""Weights that leave the GPU and come back: what is copied, what stays in RAM. The GPU is played."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.memory.pinned import PinnedMemory
from studio_worker.engine.memory.placement import Footprint, Mode
from studio_worker.engine.memory.ram_copies import pin, to_device, to_ram
from studio_worker.engine.memory.residency import Place, Residency
from studio_worker.engine.rendering.needs import footprint
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.gpu_check.tiny.model import Form
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests.fakes.played_gpu import PlayedGpu, played
from tests.lab.engine import SAMPLE, SMALL, changed_sample, encoded, request, scene
from tests.lab.memory import GIB, Fake, component, key

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

DEVICE = torch.device("cuda:1")
PICTURE_BYTES = 1 << 18
"""More than a picture, its noise and its prompt take, and less than any of the weights."""


@pytest.fixture
def gpu() -> Iterator[PlayedGpu]:
    with played("cuda:1") as gpu:
        torch.cuda.set_device(DEVICE)
        yield gpu


def sample_needs() -> Footprint:
    """What the sample model and a picture of it need on a GPU."""
    return footprint(identify([SAMPLE]), "float16", 64 * 64)


def left_on(gpu: PlayedGpu) -> int:
    gc.collect()
    return gpu.used_bytes


def made(engine: DiffusionEngine, *files: LocalFile, **task: Any) -> bytes:
    return engine.generate(request(files=files, **task), lambda done, total: None, Cancel()).data


# --- what is copied ---


def test_model_that_was_in_ram_leaves_without_being_copied(gpu: PlayedGpu, tmp_path: Path) -> None:
    """Two models that take turns on a GPU with room for one go to RAM once; from then on a switch copies the
    weights that come, and none that leave.
    """
    one, other = (changed_sample(tmp_path / f"{name}.safetensors", lambda _: None) for name in ("one", "two"))
    engine = DiffusionEngine("cuda:1", memory=Fake(sample_needs().plans()[0].peak_bytes))
    first = made(engine, one)
    weights = gpu.used_bytes
    for turn, file in enumerate((other, one, other, one)):
        gpu.start_counting()
        assert made(engine, file) == first
        leaving = weights if turn < 2 else 0
        assert leaving <= sum(gpu.to_ram) < leaving + PICTURE_BYTES
        assert weights <= sum(gpu.to_device) < weights + PICTURE_BYTES


@pytest.mark.parametrize("mode", [Mode.COMPONENT, Mode.LAYERS])
def test_offloaded_job_copies_no_weights_back(mode: Mode, gpu: PlayedGpu) -> None:
    """A job with offload copies weights to the device, and nothing but its picture back."""
    layers = next(plan.peak_bytes for plan in sample_needs().plans() if plan.mode is Mode.LAYERS)
    engine = DiffusionEngine("cuda:1", memory=Fake(GIB if mode is Mode.COMPONENT else layers))
    asked = SMALL.model_copy(update={"offload_to_cpu": True})
    for _ in range(2):
        gpu.start_counting()
        assert (
            engine.generate(request(defaults=asked), lambda done, total: None, Cancel()).meta["offload"]
            == mode.value
        )
        assert sum(gpu.to_ram) < PICTURE_BYTES < sum(gpu.to_device)


@pytest.mark.parametrize(("name", "form"), [("z-image", "Q8_0"), ("flux1-dev", "8-bit")])
def test_matrices_that_are_written_out_are_not_copied_back(
    name: str, form: Form, gpu: PlayedGpu, tmp_path: Path
) -> None:
    """Packed matrices that came from RAM are there when they are written out on the device, packed again, and
    when they leave; the picture is the same.
    """
    model = tiny(name, tmp_path, width=128)
    engine = DiffusionEngine("cuda:1", families=(model.family,), memory=Fake(GIB, host=GIB))
    files, defaults = model.files(form), CliDefaults(width=64, height=64, steps=2, cfg_scale=1.0)
    packed = made(engine, *files, defaults=defaults.model_copy(update={"offload_to_cpu": True}))
    gpu.start_counting()
    for _ in range(2):
        assert made(engine, *files, defaults=defaults) == packed
        assert [found.is_unpacked for found in engine.resident().values()] == [True]
        engine.release()
        assert sum(gpu.to_ram) < PICTURE_BYTES


def test_component_comes_while_no_other_is_there(gpu: PlayedGpu) -> None:
    """Component by component there is room for the largest of them alone: while the denoiser works, also on a
    picture that the VAE has encoded, neither the VAE nor a text encoder is on the device.
    """
    engine = DiffusionEngine("cuda:1", memory=Fake(GIB))
    denoiser = sample_needs().weights["unet"]
    there: list[int] = []
    engine.generate(
        request(
            inputs=Inputs(encoded(scene())),
            defaults=SMALL.model_copy(update={"offload_to_cpu": True}),
        ),
        lambda done, total: there.append(gpu.used_bytes) if done else None,
        Cancel(),
    )
    assert denoiser <= max(there) < denoiser + PICTURE_BYTES


# --- what survives ---


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("sd1", "safetensors"),
        ("sdxl", "safetensors"),
        ("sd3.5-medium", "Q8_0"),
        ("flux1-dev", "8-bit"),
        ("chroma", "safetensors"),
        ("z-image", "Q8_0"),
        ("qwen-image", "Q8_0"),
    ],
)
def test_model_that_was_away_makes_the_same_picture(
    name: str, form: Form, gpu: PlayedGpu, tmp_path: Path
) -> None:
    """Whatever its weights are stored as, with LoRAs and without, a model that has left the GPU and come back
    makes the picture that it made before.
    """
    model = tiny(name, tmp_path, width=32)
    engine = DiffusionEngine("cuda:1", families=(model.family,), memory=Fake(GIB, host=GIB))
    files, defaults = model.files(form), CliDefaults(width=64, height=64, steps=2, cfg_scale=1.0)
    plain = made(engine, *files, defaults=defaults)
    used = left_on(gpu)
    for _ in range(2):
        changed = made(engine, *files, model.lora(), defaults=defaults)
        assert changed != plain
        engine.release()
        gpu.start_counting()
        assert made(engine, *files, model.lora(), defaults=defaults) == changed
        engine.release()
        assert sum(gpu.to_ram) < PICTURE_BYTES
        assert made(engine, *files, defaults=defaults) == plain
        assert left_on(gpu) == used  # the LoRA is gone


# --- what stays in RAM ---


def moved(residency: Residency, name: str, place: Place) -> torch.nn.Module:
    found = residency.get(key(name), place)
    assert found is not None
    return found


def test_weights_return_to_the_very_memory_they_came_from(gpu: PlayedGpu) -> None:
    """What a component was in RAM it is again when it leaves the device, in the same place."""
    residency = Residency(DEVICE, Fake(GIB))
    layer = torch.nn.Linear(64, 64).requires_grad_(False)
    residency.add(key("layer"), layer, Place.RAM)
    in_ram, numbers = layer.weight.data_ptr(), layer.weight.clone()
    for _ in range(2):
        assert gpu.has(moved(residency, "layer", Place.DEVICE).weight)
        residency.make_room(GIB)
        assert not gpu.has(layer.weight)
        assert layer.weight.data_ptr() == in_ram
        assert torch.equal(layer.weight, numbers)


def test_copies_of_what_is_on_the_device_are_the_first_to_leave_ram(gpu: PlayedGpu) -> None:
    """RAM counts what lies there for components on the device, too. Where it is short, that goes before any
    component that waits, the last used first; the component stays where it is.
    """
    memory = Fake(GIB, host=4096)
    residency = Residency(DEVICE, memory)
    for name in ("waits", "older", "newer"):
        residency.add(key(name), component(1), Place.RAM)
    for name in ("older", "newer"):
        moved(residency, name, Place.DEVICE)
    assert (residency.size_bytes(), residency.ram_bytes()) == (2048, 3072)
    residency.make_host_room(2048, keep=[])
    assert residency.ram_bytes() == 2048
    assert [residency.place(key(name)) for name in ("waits", "older", "newer")] == [
        Place.RAM,
        Place.DEVICE,
        Place.DEVICE,
    ]
    gpu.start_counting()
    residency.release()
    assert gpu.to_ram == [1024]  # the newer, whose copy went
    assert residency.ram_bytes() == 3072


def test_component_that_is_not_whole_anywhere_is_loaded_anew(gpu: PlayedGpu) -> None:
    """A component of which half is on the device, whatever went wrong when it left, is not used again."""
    residency = Residency(DEVICE, Fake(GIB))
    torn, sound = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    for name, layer in (("torn", torn), ("sound", sound)):
        residency.add(key(name), layer.requires_grad_(False), Place.RAM)
    torn.weight.data = torn.weight.data.to(DEVICE)
    residency.drop_torn([key("torn"), key("sound"), key("not loaded")])
    assert [residency.place(key(name)) for name in ("torn", "sound")] == [None, Place.RAM]


def test_component_for_which_the_device_has_no_room_stays_in_ram(gpu: PlayedGpu) -> None:
    """Where memory runs out while a component comes, it is in RAM as before, and nothing is left behind."""
    gpu.memory_bytes = 1500
    residency = Residency(DEVICE, Fake(GIB))
    layers = torch.nn.Sequential(component(1), component(1)).requires_grad_(False)
    residency.add(key("layers"), layers, Place.RAM)
    with pytest.raises(torch.OutOfMemoryError):
        residency.get(key("layers"), Place.DEVICE)
    assert residency.place(key("layers")) is Place.RAM
    assert not any(gpu.has(parameter) for parameter in layers.parameters())
    assert gpu.used_bytes == 0


# --- pinned ---


def test_what_waits_in_ram_is_pinned_and_let_go_with_it(gpu: PlayedGpu) -> None:
    """Weights that come to the device again and again lie in RAM that it reads by itself; when they go, their
    RAM is the system's again.
    """
    engine = DiffusionEngine("cuda:1", memory=Fake(GIB))
    asked = SMALL.model_copy(update={"offload_to_cpu": True})
    picture = made(engine, SAMPLE, defaults=asked)
    weights = sum(sample_needs().weights.values())
    assert weights <= sum(gpu.pinned.values()) < 1.05 * weights
    assert made(engine, SAMPLE) == picture
    engine.release()
    assert weights <= sum(gpu.pinned.values()) < 1.05 * weights
    del engine
    gc.collect()
    assert gpu.pinned == {}


def test_pinned_ram_has_a_limit(gpu: PlayedGpu) -> None:
    """No more is pinned than the limit says; what goes makes room."""
    pinned = PinnedMemory(DEVICE, 5000)
    first, second, third = (pinned.block(size) for size in (3000, 2001, 2000))
    assert (first is None, second is None, third is None) == (False, True, False)
    assert sum(gpu.pinned.values()) == pinned.used_bytes == 5000
    del first
    assert pinned.block(3000) is not None
    assert PinnedMemory(torch.device("cpu"), 5000).block(1) is None


def test_pinned_ram_is_let_go_by_any_thread(gpu: PlayedGpu) -> None:
    """A thread whose current GPU is another touches none but the one that RAM was pinned for."""
    block = PinnedMemory(DEVICE, 5000).block(5000)
    torch.cuda.set_device(0)  # each thread has its own
    assert sum(gpu.pinned.values()) == 5000
    del block
    assert gpu.pinned == {}
    assert gpu.current == 0


@pytest.mark.parametrize("pinnable_bytes", [0, 1 << 20])
def test_ram_that_cannot_be_pinned_serves_as_well(gpu: PlayedGpu, pinnable_bytes: int) -> None:
    """Where the driver pins nothing, or not enough, pictures are the same, only slower."""
    expected = made(DiffusionEngine("cuda:1"), SAMPLE)
    gpu.pinnable_bytes = pinnable_bytes
    engine = DiffusionEngine("cuda:1", memory=Fake(GIB))
    for _ in range(2):
        assert made(engine, SAMPLE, defaults=SMALL.model_copy(update={"offload_to_cpu": True})) == expected
        assert made(engine, SAMPLE) == expected
        engine.release()


def test_pinning_keeps_numbers_and_their_order(gpu: PlayedGpu) -> None:
    """Pinned weights are the same numbers of the same types, laid out as they were."""
    layers = torch.nn.ModuleDict(
        {
            "halves": torch.nn.Linear(5, 3).half(),
            "filters": torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last),
            "counts": torch.nn.BatchNorm1d(7),
        }
    ).requires_grad_(False)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in layers.state_dict().items()}
    pin(layers, PinnedMemory(DEVICE, GIB))
    copy = to_device(layers, DEVICE)
    to_ram(layers, DEVICE, copy)
    (at, size), *_ = gpu.pinned.items()
    for name, tensor in layers.state_dict().items():
        numbers, stride = before[name]
        assert torch.equal(tensor, numbers)
        assert (tensor.dtype, tensor.stride()) == (numbers.dtype, stride)
        assert at <= tensor.data_ptr() < at + size
