"""Models that are not whole on the device: component by component, layer by layer. The GPU is played."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.family import Family
from studio_worker.engine.memory.placement import Mode
from studio_worker.engine.probe import probe
from studio_worker.engine.rendering.needs import footprint
from studio_worker.errors import JobCancelled, JobError
from studio_worker.gpu_check.tiny.families import tiny as tiny_model
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests.fakes.played_gpu import PlayedGpu, played
from tests.lab.engine import PROMPT, encoded, request, scene
from tests.lab.memory import RAM, Fake

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIDE = 64
DEFAULTS = CliDefaults(width=SIDE, height=SIDE, steps=2, cfg_scale=2.0)
DISTINCT = [
    "sd1",
    "sdxl-inpaint",
    "sd3-medium",
    "sd3.5-medium",
    "flux1-dev",
    "flux1-fill",
    "chroma",
    "z-image",
    "qwen-image",
]
"""Families without those whose classes and files are another's."""

TABLES_BYTES = {"z-image": 1 << 20, "qwen-image": 2 << 20}
"""What denoisers keep of their tables of positions where they computed last. Any of their weights is more."""


@dataclass(frozen=True)
class Model:
    """A tiny model's family, its files, and a LoRA for it."""

    family: Family
    files: tuple[LocalFile, ...]
    lora: LocalFile


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    # So large that weights, not the picture, decide what there is room for.
    widths = dict.fromkeys(DISTINCT, 32) | {"z-image": 128}
    tinies = {name: tiny_model(name, tmp_path_factory.mktemp(name), width) for name, width in widths.items()}
    return {name: Model(tiny.family, tiny.files(), tiny.lora()) for name, tiny in tinies.items()}


@pytest.fixture
def gpu() -> Iterator[PlayedGpu]:
    """The second of two GPUs, so that whatever does not say which one it means touches the other."""
    with played("cuda:1") as gpu:
        yield gpu


def left_on(gpu: PlayedGpu) -> int:
    """Bytes on the device that anybody still holds."""
    gc.collect()
    return gpu.used_bytes


def room_for(tiny: Model, mode: Mode, *, is_edit: bool = False) -> Fake:
    """A GPU that has room for ``mode`` alone."""
    needed = footprint(
        identify(tiny.files, (tiny.family,)), "float16", SIDE * SIDE, kind="edit" if is_edit else "text"
    )
    peaks = {plan.mode: plan.peak_bytes for plan in reversed(needed.plans())}
    assert peaks[Mode.LAYERS] < min(peaks[Mode.WHOLE], peaks[Mode.COMPONENT])
    return Fake(peaks[mode] if mode is Mode.LAYERS else RAM, host=RAM)


def engine_for(tiny: Model, mode: Mode) -> DiffusionEngine:
    return DiffusionEngine("cuda:1", families=(tiny.family,), memory=room_for(tiny, mode))


def picture(engine: DiffusionEngine, tiny: Model, mode: Mode, **task: Any) -> bytes:
    """What the engine makes in ``mode``: from the prompt alone, or where the family cannot, within a mask."""
    given = encoded(scene(SIDE, SIDE))
    asked: dict[str, Any] = {
        "files": tiny.files,
        "defaults": DEFAULTS.model_copy(update={"offload_to_cpu": mode is not Mode.WHOLE}),
        "inputs": Inputs() if tiny.family.pipelines.text else Inputs(given, given),
        "cfg_scale": 1.0 if "fill" in tiny.family.name else 2.0,
        "prompt": PROMPT,
    }
    progress = task.pop("progress", lambda _done, _total: None)
    made = engine.generate(request(**asked | task), progress, task.pop("cancel", Cancel()))
    assert made.meta.get("offload", "whole") == mode.value
    return made.data


@pytest.mark.parametrize("name", DISTINCT)
def test_offloaded_picture_of_every_family(name: str, models: dict[str, Model], gpu: PlayedGpu) -> None:
    """Component by component and layer by layer, every family makes the picture of the whole model, also
    when the prompt was read before; afterwards none of its weights is on the device.
    """
    tiny = models[name]
    whole = picture(engine_for(tiny, Mode.WHOLE), tiny, Mode.WHOLE)
    for mode in (Mode.COMPONENT, Mode.LAYERS):
        engine = engine_for(tiny, mode)
        for _ in range(2):
            assert picture(engine, tiny, mode) == whole
            assert left_on(gpu) <= TABLES_BYTES.get(name, 0)


def fail_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer that is called fails, as a kernel does that has no code for the card."""
    forward, left = torch.nn.Linear.forward, iter(range(1))

    def once(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        if next(left, None) is not None:
            raise RuntimeError("not implemented for this card")
        return forward(self, input)

    monkeypatch.setattr(torch.nn.Linear, "forward", once)


@pytest.mark.parametrize("mode", [Mode.COMPONENT, Mode.LAYERS])
@pytest.mark.parametrize("name", ["sd1", "flux1-dev", "qwen-image"])
def test_offload_goes_on_whatever_became_of_a_job(
    name: str, mode: Mode, models: dict[str, Model], gpu: PlayedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a job that was cancelled at its first step, one that failed inside its first layer, one with a
    prompt that was read before and one with another prompt, pictures are what they were.
    """
    tiny = models[name]
    engine = engine_for(tiny, mode)
    first = picture(engine, tiny, mode)
    cancel = Cancel()

    def stop(done: int, _total: int) -> None:
        if done:
            cancel.set("enough")

    with pytest.raises(JobCancelled):
        engine.generate(
            request(
                files=tiny.files,
                defaults=DEFAULTS.model_copy(update={"offload_to_cpu": True}),
                prompt=PROMPT,
            ),
            stop,
            cancel,
        )
    assert left_on(gpu) <= TABLES_BYTES.get(name, 0)
    with monkeypatch.context() as patch:
        fail_first(patch)
        with pytest.raises(JobError, match="could not be made: RuntimeError"):
            picture(engine, tiny, mode, prompt="another prompt")
    assert left_on(gpu) <= TABLES_BYTES.get(name, 0)
    assert picture(engine, tiny, mode) == first
    assert picture(engine, tiny, mode, prompt="another prompt") != first
    assert picture(engine, tiny, mode) == first


def test_component_without_work_does_not_come(models: dict[str, Model], gpu: PlayedGpu) -> None:
    """What reads reference pictures stays in RAM while a picture is made from a prompt alone."""
    tiny = models["qwen-image"]
    vision = footprint(identify(tiny.files, (tiny.family,)), "bfloat16", SIDE * SIDE).weights["vision"]
    engine = engine_for(tiny, Mode.COMPONENT)
    picture(engine, tiny, Mode.COMPONENT)
    weights = sum(found.size_bytes for found in engine.resident().values())
    gpu.start_counting()
    picture(engine, tiny, Mode.COMPONENT, prompt="another prompt")
    assert weights - 1.1 * vision < sum(gpu.to_device) < weights - 0.9 * vision


@pytest.mark.parametrize("name", ["sd1", "z-image", "qwen-image"])
def test_offloaded_picture_with_lora(name: str, models: dict[str, Model], gpu: PlayedGpu) -> None:
    """A LoRA comes and leaves with the component that it is in, and changes no picture without it."""
    tiny = models[name]
    files = (*tiny.files, tiny.lora)
    engine = engine_for(tiny, Mode.WHOLE)
    plain, changed = (picture(engine, tiny, Mode.WHOLE, files=each) for each in (tiny.files, files))
    assert plain != changed
    for mode in (Mode.COMPONENT, Mode.LAYERS):
        engine = engine_for(tiny, mode)
        for each, expected in ((files, changed), (tiny.files, plain), (files, changed)):
            assert picture(engine, tiny, mode, files=each) == expected
            assert left_on(gpu) <= TABLES_BYTES.get(name, 0)


@pytest.mark.parametrize("name", ["qwen-image", "flux1-dev"])
def test_edit_and_text_take_turns_layer_by_layer(
    name: str, models: dict[str, Model], gpu: PlayedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads a reference picture, and does not run in the jobs between, is no obstacle to them."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 112 * 112)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(80, 64), (64, 80)])
    tiny = models[name]
    tiny = replace(tiny, family=replace(tiny.family, reference_pixels=SIDE * SIDE))
    reference = Inputs(ref_image=encoded(scene(80, 64)))
    expected = {
        inputs: picture(engine_for(tiny, Mode.WHOLE), tiny, Mode.WHOLE, inputs=inputs)
        for inputs in (Inputs(), reference)
    }
    memory = room_for(tiny, Mode.LAYERS)
    engine = DiffusionEngine("cuda:1", families=(tiny.family,), memory=memory)
    for inputs in (reference, Inputs(), reference, Inputs()):
        memory.device = room_for(tiny, Mode.LAYERS, is_edit=inputs is reference).device
        assert picture(engine, tiny, Mode.LAYERS, inputs=inputs) == expected[inputs]


@pytest.mark.parametrize("begins", [DiffusionEngine, probe])
def test_only_the_gpu_that_is_asked_for_is_touched(begins: Callable[[str], Any], gpu: PlayedGpu) -> None:
    """What is started for the second GPU makes it torch's current one, before anything is put anywhere."""
    begins("cuda:1")
    assert gpu.current == 1
    assert gpu.peak_bytes > 0
