"""LoRA files: every layout, several at once, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.loras.wanted import asked_loras
from studio_worker.engine.rendering.needs import footprint
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import LocalFile
from tests.lab.engine import PROMPT, SAMPLE, decoded, request, write_header
from tests.lab.stock import run, sample_pipeline
from tests.lab.tiny_z_image import Tiny, text_encoder_file, tiny_z_image, transformer_file, vae_file

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

RANK, ALPHA = 4, 2.0


@pytest.fixture
def engine() -> DiffusionEngine:
    return DiffusionEngine("cpu")


@pytest.fixture
def stock() -> StableDiffusionPipeline:
    return sample_pipeline()


def targets(pipeline: StableDiffusionPipeline) -> Iterator[tuple[str, str, torch.nn.Linear]]:
    """The layers that LoRAs for Stable Diffusion are trained on: component, name, layer."""
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            yield "unet", name, module
    for name, module in pipeline.text_encoder.named_modules():
        if name.endswith(("q_proj", "v_proj", "out_proj")):
            yield "text_encoder", name, module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_z_image(tmp_path_factory.mktemp("z-image"))


def factors(pipeline: StableDiffusionPipeline, seed: int) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Random down and up matrices for each target, of an effect that is easily seen."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (part, name): (
            torch.randn(RANK, layer.in_features, generator=generator) * 0.3,
            torch.randn(layer.out_features, RANK, generator=generator) * 0.3,
        )
        for part, name, layer in targets(pipeline)
    }


def write(path: Path, pipeline: StableDiffusionPipeline, layout: str, seed: int = 0) -> LocalFile:
    """A LoRA file in a published layout: diffusers' (as its training scripts save it) or kohya-ss's."""
    tensors: dict[str, torch.Tensor] = {}
    for (part, name), (down, up) in factors(pipeline, seed).items():
        if layout == "diffusers":
            inner = f"text_model.{name}" if part == "text_encoder" else name
            # Alpha is not in the tensors of this layout: it is in the up matrix.
            tensors[f"{part}.{inner}.lora_A.weight"] = down
            tensors[f"{part}.{inner}.lora_B.weight"] = up * (ALPHA / RANK)
        else:
            inner = f"te_text_model_{name}" if part == "text_encoder" else f"unet_{name}"
            stem = f"lora_{inner.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return LocalFile("lora", path, str(path))


def merge(pipeline: StableDiffusionPipeline, seed: int, weight: float = 1.0) -> None:
    """What a LoRA means: W + weight * alpha / rank * up @ down (Hu et al. 2021)."""
    made = factors(pipeline, seed)
    for part, name, layer in targets(pipeline):
        down, up = made[part, name]
        layer.weight.data += weight * ALPHA / RANK * up @ down


def make(engine: DiffusionEngine, *loras: LocalFile, prompt: str = PROMPT) -> Picture:
    asked = request(files=(SAMPLE, *loras), prompt=prompt, sampling_method="euler")
    return engine.generate(asked, lambda done, total: None, Cancel())


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(decoded(picture.data), dtype=int)


def same(one: Picture, other: Picture) -> bool:
    """Whether pictures are equal; files also hold their prompts."""
    return bool((pixels(one) == pixels(other)).all())


def expected(stock: StableDiffusionPipeline) -> np.ndarray:
    image = run(stock, prompt=PROMPT, guidance_scale=4.0, width=64, height=64, steps=4, seed=7)
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_picture_is_that_of_the_merged_weights(
    engine: DiffusionEngine, stock: StableDiffusionPipeline, tmp_path: Path, layout: str
) -> None:
    """In either layout a LoRA has the effect that merging it by hand has, on denoiser and text encoder."""
    lora = write(tmp_path / "style.safetensors", stock, layout)
    picture = make(engine, lora)
    plain = expected(stock)
    merge(stock, 0)
    found = pixels(picture)
    assert np.abs(found - expected(stock)).max() <= 2  # adding and multiplying in another order
    assert np.abs(found - plain).mean() > 5
    assert picture.meta["loras"] == {"style": 1.0}


def test_several_loras_work_together_at_their_weights(
    engine: DiffusionEngine, stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Several LoRAs add up, each at the weight that the prompt gives it; the tag is no word of the prompt."""
    first = write(tmp_path / "style.safetensors", stock, "diffusers", seed=1)
    second = write(tmp_path / "hero.safetensors", stock, "kohya", seed=2)
    picture = make(engine, first, second, prompt=f"{PROMPT} <lora:style:0.5>")
    merge(stock, 1, 0.5)
    merge(stock, 2)
    assert np.abs(pixels(picture) - expected(stock)).max() <= 2
    assert picture.meta["loras"] == {"style": 0.5, "hero": 1.0}


def spoil(path: Path) -> None:
    """Its content is another one, and nothing else tells."""
    was = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(was.st_size))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def test_next_job_without_is_as_if_there_had_been_none(
    engine: DiffusionEngine, stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """After a LoRA, and after one that failed, the plain model makes the very pictures it made before."""
    lora = write(tmp_path / "style.safetensors", stock, "kohya")
    other = write(tmp_path / "hero.safetensors", stock, "kohya", seed=3)
    bad = LocalFile("lora", tmp_path / "bad.safetensors", "bad")
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(4, 8)}, bad.path)
    plain = make(engine).data
    styled = make(engine, lora).data
    assert make(engine, other).data != styled
    with pytest.raises(JobError):
        make(engine, lora, bad)
    assert make(engine).data == plain
    assert make(engine, lora).data == styled
    spoil(lora.path)  # what is in the model already is not read again
    assert make(engine, lora).data == styled


def test_lora_counts_in_memory_as_long_as_it_is_there(
    engine: DiffusionEngine, stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """What a LoRA takes is planned for before it is loaded, and is part of its model's size until it goes."""
    lora = write(tmp_path / "lora.safetensors", stock, "diffusers")

    def size_bytes(*files: LocalFile) -> int:
        engine.generate(request(files=(SAMPLE, *files)), lambda done, total: None, Cancel())
        return engine.resident()["sample-model"].size_bytes

    plain = size_bytes()
    alone, beside = (footprint(identify([SAMPLE]), "float32", 64 * 64, loras=each) for each in ((), (lora,)))
    more = beside.plans()[0].peak_bytes - alone.plans()[0].peak_bytes
    assert size_bytes(lora) - plain == more > 0
    assert size_bytes() == plain


def test_lora_of_weight_nothing_is_none(
    engine: DiffusionEngine, stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """At weight 0 a LoRA has no effect at all."""
    lora = write(tmp_path / "style.safetensors", stock, "kohya")
    assert same(make(engine, lora, prompt=f"{PROMPT} <lora:style:0>"), make(engine))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"unet.mid_block.attentions.0.proj_in.nowhere.lora_A.weight": (4, 8)}, "bad.safetensors"),
        ({"transformer.blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "bad.safetensors"),
        ({"model.diffusion_model.weight": (4, 8)}, "bad.safetensors"),
    ],
)
def test_what_is_no_lora_of_this_family_is_refused(
    engine: DiffusionEngine, tmp_path: Path, tensors: dict[str, tuple[int, ...]], says: str
) -> None:
    """A LoRA of another family, or no LoRA at all, fails the job by the file's name."""
    path = write_header(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(JobError, match=says) as caught:
        make(engine, LocalFile("lora", path, "bad"))
    assert caught.value.is_final_here


FOREIGN = {
    "SD, kohya": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_down",
        "lora_up",
    ),
    "SD, diffusers": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "lora_A", "lora_B"),
    "FLUX.1, kohya": ("lora_unet_double_blocks_0_img_attn_qkv", "lora_down", "lora_up"),
    "FLUX.1, diffusers": ("transformer.single_transformer_blocks.0.attn.to_q", "lora_A", "lora_B"),
    "Wan": ("diffusion_model.blocks.0.self_attn.q", "lora_A", "lora_B"),
    "SD 3": ("transformer.transformer_blocks.0.attn2.to_q", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_lora_of_another_family_is_refused_on_z_image(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """On the studio's daily model a LoRA of any other family fails the job by the file's name."""
    stem, down, up = FOREIGN[kind]
    tensors = {f"{stem}.{down}.weight": torch.zeros(4, 64), f"{stem}.{up}.weight": torch.zeros(64, 4)}
    if "kohya" in kind:
        tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "other.safetensors")
    lora = LocalFile("lora", tmp_path / "other.safetensors", kind)
    with pytest.raises(JobError, match=r"LoRA other\.safetensors") as caught:
        tiny.picture(transformer_file(tiny, "original"), text_encoder_file(tiny), vae_file(tiny), lora)
    assert caught.value.is_final_here


def test_lora_of_another_size_is_refused(
    engine: DiffusionEngine, stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """A LoRA trained on a model of other widths is refused with the tensor that does not fit."""
    name = next(name for part, name, _ in targets(stock) if part == "unet")
    path = tmp_path / "wide.safetensors"
    shapes = {"lora_A": (4, 999), "lora_B": (999, 4)}
    save_file({f"unet.{name}.{each}.weight": torch.zeros(shape) for each, shape in shapes.items()}, path)
    with pytest.raises(JobError, match=r"wide\.safetensors does not fit this model: size mismatch"):
        make(engine, LocalFile("lora", path, "wide"))


def test_pickled_lora_is_refused(engine: DiffusionEngine, tmp_path: Path) -> None:
    """A LoRA as a pickle is refused by name, like any other pickle."""
    path = tmp_path / "style.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(JobError, match="pickle"):
        make(engine, LocalFile("lora", path, "pickle"))


def test_tag_is_read_as_stable_diffusion_cpp_writes_it(tmp_path: Path) -> None:
    """A tag sets the weight of a file by its name, wherever in the prompt it stands; without one it is 1."""
    files = [LocalFile("lora", tmp_path / f"{name}.safetensors", name) for name in ("a", "b")]
    prompt, loras, _ = asked_loras("one <lora:a:-0.5>, two", [SAMPLE, *files])
    assert prompt == "one , two"
    assert [(lora.name, lora.weight) for lora in loras] == [("a", -0.5), ("b", 1.0)]
    assert asked_loras("red", [SAMPLE]) == ("red", (), ())


def test_tag_of_an_unknown_lora_is_left_out(
    engine: DiffusionEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A tag that names a LoRA that the source does not bring makes the picture that it makes without, as in
    stable-diffusion.cpp; a warning and generationMeta say so.
    """
    picture = make(engine, prompt=f"{PROMPT}<lora:nosuch:0.8><lora:other:much>")
    assert same(picture, make(engine))
    assert picture.meta["unknownLoras"] == ["nosuch", "other"]
    (record,) = [each for each in caplog.records if "LoRAs" in each.message]
    assert (record.levelname, record.count) == ("WARNING", 2)  # type: ignore[attr-defined]
    assert "nosuch" not in record.getMessage()


@pytest.mark.parametrize("part", [" ", "<lora:", "<lora:a", "<lora:a:", "<", "\n\t"])
def test_tags_of_an_endless_prompt_are_read_at_once(part: str) -> None:
    """A megabyte of blanks or of beginnings of tags is read without a second thought."""
    assert asked_loras(part * (2**20 // len(part)), [SAMPLE]).loras == ()


def test_loras_of_one_name_all_work(tmp_path: Path) -> None:
    """Two files that are called alike, in two folders, are both brought in, and a tag is for both."""
    files = [LocalFile("lora", tmp_path / folder / "style.safetensors", folder) for folder in "ab"]
    assert [each.file for each in asked_loras("a", files).loras] == files
    assert [each.weight for each in asked_loras("a <lora:style:0.5>", files).loras] == [0.5, 0.5]


@pytest.mark.parametrize("tag", ["<lora:a:much>", "<lora:a:11>", "<lora:a:nan>"])
def test_impossible_tag_is_refused(tmp_path: Path, tag: str) -> None:
    """A tag that gives a LoRA no sensible weight is an error."""
    with pytest.raises(JobError, match="LoRA") as caught:
        asked_loras(f"red {tag}", [LocalFile("lora", tmp_path / "a.safetensors", "a")])
    assert caught.value.is_final_here
