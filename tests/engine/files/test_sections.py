"""From a source's files to components: whole checkpoints, parts, and what two models have in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio_worker import sample_model
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.stable_diffusion import SAMPLE as SAMPLE_FAMILY
from studio_worker.engine.files.sections import read_sections
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from studio_worker.models import FileRole, LocalFile
from tests.lab.engine import SAMPLE, changed_sample, request

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PREFIXES = {
    "diffusion-model": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text-encoder": "cond_stage_model.transformer.",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LocalFile]:
    """The sample model in three files, as sources with a diffusion-model have it."""
    folder = tmp_path_factory.mktemp("parts")
    tensors = load_file(sample_model.WEIGHTS)
    made = {}
    for role, prefix in PREFIXES.items():
        path = folder / f"{role}.safetensors"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        save_file(own, path)
        made[role] = local(role, path)
    return made


def local(role: Any, path: Path) -> LocalFile:
    known: FileRole = role
    return LocalFile(known, path, str(path))


def picture(engine: DiffusionEngine, *files: LocalFile) -> bytes:
    return engine.generate(request(files=files), lambda done, total: None, Cancel()).data


def test_whole_checkpoint_has_three_sections() -> None:
    """A checkpoint is read as the components that its prefixes mark off."""
    assert sorted(section.prefix for section in read_sections([SAMPLE])) == sorted(PREFIXES.values())


def test_model_in_parts_makes_the_whole_checkpoints_picture(parts: dict[str, LocalFile]) -> None:
    """The same weights in one file or in three give the same bytes, in whatever order files are named."""
    expected = picture(DiffusionEngine("cpu"), SAMPLE)
    assert picture(DiffusionEngine("cpu"), *parts.values()) == expected
    assert picture(DiffusionEngine("cpu"), *reversed(parts.values())) == expected


def test_file_of_a_role_wins_over_the_checkpoints_own(tmp_path: Path) -> None:
    """A vae beside a whole checkpoint is the one that decodes."""

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["first_stage_model.decoder.conv_out.bias"][0] = float("nan")

    broken = changed_sample(tmp_path / "broken.safetensors", spoil)
    engine = DiffusionEngine("cpu")
    with pytest.raises(JobError, match="not finite"):
        picture(engine, broken)
    assert picture(engine, broken, SAMPLE._replace(role="vae")) == picture(engine, SAMPLE)


def test_shared_file_is_loaded_once(parts: dict[str, LocalFile], caplog: pytest.LogCaptureFixture) -> None:
    """Of two models that share a text encoder and a vae, the second loads its denoiser only."""
    caplog.set_level("INFO")
    engine = DiffusionEngine("cpu")
    picture(engine, *parts.values())
    other = parts["diffusion-model"]._replace(content="another")
    picture(engine, other, parts["text-encoder"], parts["vae"])
    loaded = [record.components for record in caplog.records if record.message == "model loaded"]  # type: ignore[attr-defined]
    assert loaded == [["unet", "text_encoder", "vae"], ["unet"]]


@pytest.mark.parametrize("role", ["vae", "text-encoder"])
def test_missing_component_names_role_and_forms(parts: dict[str, LocalFile], role: str) -> None:
    """A source that lacks a component is told the role, and the forms in which it may come."""
    files = [file for file in parts.values() if file.role != role]
    with pytest.raises(
        JobError, match=rf"sample needs .* role {role}, safetensors or GGUF.*brings none"
    ) as c:
        identify(files)
    assert c.value.is_final_here


def test_wrong_component_says_what_is_wrong_with_it(parts: dict[str, LocalFile], tmp_path: Path) -> None:
    """A file of the right role and the wrong kind is named, with what tells that it is wrong."""
    path = tmp_path / "vae16.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)}, path)
    with pytest.raises(JobError, match=r"vae16\.safetensors \(vae\) is not it: .*\[64, 16, 3, 3\]"):
        identify([parts["diffusion-model"], parts["text-encoder"], local("vae", path)])


def test_file_nothing_needs_is_refused(parts: dict[str, LocalFile]) -> None:
    """A file that the model has no use for is not silently ignored."""
    extra = parts["vae"]._replace(role="text-encoder-vision", content="extra")
    with pytest.raises(JobError, match=r"has no use for vae\.safetensors \(text-encoder-vision\)"):
        identify([*parts.values(), extra])


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")],
)
def test_memory_that_runs_out_while_loading_is_no_fault_of_the_file(
    parts: dict[str, LocalFile], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out while a component is loaded is said so, and another worker may have more."""

    def exhausted(_tensors: object) -> dict[str, Any]:
        raise error

    vae = SAMPLE_FAMILY.parts["vae"]
    layouts = tuple(replace(layout, rename=exhausted) for layout in vae.layouts)
    family = replace(SAMPLE_FAMILY, parts={**SAMPLE_FAMILY.parts, "vae": replace(vae, layouts=layouts)})
    with pytest.raises(JobError, match="out of memory") as caught:
        picture(DiffusionEngine("cpu", families=(family,)), *parts.values())
    assert caught.value.retryable


def test_numbers_of_several_kinds_in_one_file_make_their_picture(tmp_path: Path) -> None:
    """A checkpoint of double, single and half precision and bfloat16 at once, as merging tools leave it,
    makes the picture of the very numbers that it has.
    """
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def mixed(tensors: dict[str, Any]) -> None:
        for index, name in enumerate(tensors):
            if tensors[name].is_floating_point():  # all of them hold what bfloat16 leaves of half precision
                tensors[name] = tensors[name].to(torch.bfloat16).to(types[index % len(types)])

    def single(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if tensors[name].is_floating_point():
                tensors[name] = tensors[name].to(torch.bfloat16).float()

    engine = DiffusionEngine("cpu")
    found = picture(engine, changed_sample(tmp_path / "mixed.safetensors", mixed))
    assert found == picture(engine, changed_sample(tmp_path / "single.safetensors", single))
    assert found != picture(engine, SAMPLE)
