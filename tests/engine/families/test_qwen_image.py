"""Qwen-Image and its edits: tiny random models in the published layouts, beside the library's pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.family import JobKind
from studio_worker.engine.families.parts.qwen_vl import PictureProcessor
from studio_worker.engine.families.qwen import QWEN_TOKENIZER
from studio_worker.engine.families.qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT_2511
from studio_worker.engine.loading import load_tokenizer
from studio_worker.engine.memory.placement import Mode
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.needs import footprint
from studio_worker.errors import JobError
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.gpu_check.tiny.quantised import Kind, write_gguf
from studio_worker.gpu_check.tiny.qwen_image import tiny_qwen_image, transformer_config
from studio_worker.models import LocalFile
from tests.lab.engine import decoded, encoded, scene
from tests.lab.flow_models import (
    DEFAULTS,
    GUIDANCE,
    HEIGHT,
    WIDTH,
    difference,
    make,
    offloaded,
    pipeline,
    right_half,
    same,
    stock,
)
from tests.lab.quantising import DECODING, Q4, Q8, dequantised

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(autouse=True)
def _small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference pictures are read at a few thousand pixels, not a million: by engine and library alike."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", WIDTH * HEIGHT)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 112 * 112)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_qwen_image(tmp_path_factory.mktemp("qwen-image"), QWEN_IMAGE)


@pytest.fixture(scope="module")
def files(tiny: Tiny) -> tuple[LocalFile, ...]:
    """Denoiser, text encoder with its vision encoder, VAE."""
    return tiny.files()


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> DiffusionEngine:
    return DiffusionEngine("cpu", families=(tiny.family,))


@pytest.fixture(autouse=True)
def _plain_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's pipelines for Qwen-Image give what they guided the length it had without, which neither
    the engine nor stable-diffusion.cpp does: here all lengths are one.
    """
    even = SimpleNamespace(**{**vars(torch), "norm": lambda x, **_: torch.ones_like(x[..., :1])})
    for each in (pipeline_qwenimage, pipeline_qwenimage_edit_plus):
        monkeypatch.setattr(each, "torch", even)


def guided(tiny: Tiny, **arguments: Any) -> Image.Image:
    """What the library's own pipeline makes, guided as the files' defaults say."""
    pipe = pipeline(tiny, QwenImagePipeline)
    return stock(pipe, **{"true_cfg_scale": GUIDANCE, "negative_prompt": ""} | arguments)


def test_picture_is_the_librarys(tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]) -> None:
    """From the published files a picture is, pixel for pixel, what the library's pipeline makes."""
    assert same(make(engine, files), guided(tiny))


def test_picture_without_guidance_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]
) -> None:
    """At cfgScale 1 nothing is computed for the negative prompt, and the picture is the library's."""
    expected = guided(tiny, true_cfg_scale=1.0, negative_prompt=None)
    assert same(make(engine, files, cfg_scale=1.0, negative_prompt="blue"), expected)


def test_picture_from_picture_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]
) -> None:
    """Image-to-image is the library's, pixel for pixel."""
    expected = guided(tiny, picture=scene(WIDTH, HEIGHT), denoise=0.7)
    assert same(make(engine, files, inputs=Inputs(encoded(scene(WIDTH, HEIGHT))), denoise=0.7), expected)


def test_picture_within_mask_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]
) -> None:
    """Inpainting is the library's where the mask is white, and untouched elsewhere."""
    start, mask = scene(WIDTH, HEIGHT), right_half()
    expected = guided(tiny, picture=start, mask=mask, denoise=0.7)
    picture = make(engine, files, inputs=Inputs(encoded(start), encoded(mask)), denoise=0.7)
    assert same(picture, Image.composite(expected, start, mask))


def gguf_of(tiny: Tiny, part: str, kind: Kind | None) -> LocalFile:
    """The file of ``part`` as city96, QuantStack, unsloth and mradermacher publish it."""
    file = tiny.published[part]
    tensors = file.tensors if file.in_gguf is None else file.in_gguf
    path = tiny.folder / f"{part}-{kind and kind.name}.gguf"
    return write_gguf(path, file.role, tensors, file.architecture, kind)


def language_gguf(tiny: Tiny, kind: Kind | None) -> LocalFile:
    return gguf_of(tiny, "text_encoder", kind)


def vision_gguf(tiny: Tiny, kind: Kind | None) -> LocalFile:
    return gguf_of(tiny, "vision", kind)


def denoiser_gguf(tiny: Tiny, kind: Kind | None) -> LocalFile:
    return gguf_of(tiny, "transformer", kind)


def test_unquantised_gguf_makes_the_librarys_picture(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]
) -> None:
    """GGUF files in single precision, text encoder included, make the library's picture pixel for pixel."""
    parts = (denoiser_gguf(tiny, None), language_gguf(tiny, None), files[2])
    assert same(make(engine, parts), guided(tiny))


@pytest.mark.parametrize(("kind", "bound"), [(Q8, 0.3), (Q4, 2.0)])
def test_quantised_gguf_is_near_the_librarys_picture(
    tiny: Tiny,
    engine: DiffusionEngine,
    files: tuple[LocalFile, ...],
    kind: Kind,
    bound: float,
) -> None:
    """Quantised files make nearly the library's picture: off by less than ``bound`` in 255; and hardly
    another one than the numbers that they were made to.
    """
    parts = (denoiser_gguf(tiny, kind), language_gguf(tiny, kind))
    picture = make(engine, [*parts, files[2]])
    assert 0 < difference(picture, guided(tiny)) < bound
    assert difference(picture, make(engine, [*map(dequantised, parts), files[2]])) <= DECODING


class ToldWherePicturesAre(Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """The library's text encoder, told which tokens are a picture's.

    transformers 5 numbers a picture's patches by their place only then, and diffusers' pipelines for
    Qwen-Image-Edit (0.42) do not tell it; the model was trained with places.
    """

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        kinds = (input_ids == self.config.image_token_id).int()
        return super().forward(input_ids=input_ids, mm_token_type_ids=kinds, **inputs)


def edited(tiny: Tiny, reference: Image.Image, **arguments: Any) -> Image.Image:
    """What the library's pipeline for edits makes."""
    processor = PictureProcessor(
        load_tokenizer(QWEN_TOKENIZER), tiny.parts["text_encoder"].config.vision_config
    )
    text_encoder = ToldWherePicturesAre(tiny.parts["text_encoder"].config).eval()
    text_encoder.load_state_dict(tiny.parts["text_encoder"].state_dict())
    pipe = pipeline(tiny, QwenImageEditPlusPipeline, text_encoder=text_encoder, processor=processor)
    asked = {"true_cfg_scale": GUIDANCE, "negative_prompt": "", "image": reference}
    return stock(pipe, **asked | arguments)


@pytest.fixture(scope="module")
def reference() -> Image.Image:
    return scene(80, 56)


def test_edit_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...], reference: Image.Image
) -> None:
    """An edit by reference (refImageUrl) is the library's, from the text encoder's own vision encoder."""
    picture = make(engine, files, inputs=Inputs(ref_image=encoded(reference)))
    assert same(picture, edited(tiny, reference))
    assert (picture.meta["width"], picture.meta["height"]) == (WIDTH, HEIGHT)


def test_edit_within_mask_keeps_the_rest(
    engine: DiffusionEngine, files: tuple[LocalFile, ...], reference: Image.Image
) -> None:
    """With a mask, an edit leaves the reference picture as it is where the mask is black."""
    inputs = {"ref_image": encoded(reference)}
    whole = decoded(make(engine, files, inputs=Inputs(**inputs)).data)
    picture = make(engine, files, inputs=Inputs(**inputs, mask=encoded(right_half())))
    kept = reference.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    assert same(picture, Image.composite(whole, kept, right_half()))


def test_edit_reads_vision_encoder_from_mmproj(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...], reference: Image.Image
) -> None:
    """GGUF language model and GGUF vision encoder (role text-encoder-vision) make the library's edit."""
    parts = (files[0], language_gguf(tiny, None), vision_gguf(tiny, None), files[2])
    assert same(make(engine, parts, inputs=Inputs(ref_image=encoded(reference))), edited(tiny, reference))


def test_edit_without_vision_encoder_says_what_to_register(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...], reference: Image.Image
) -> None:
    """A GGUF text encoder alone cannot see: the error names the role and the files that can."""
    parts = (files[0], language_gguf(tiny, None), files[2])
    with pytest.raises(JobError, match=r"role text-encoder-vision .*mmproj") as caught:
        make(engine, parts, inputs=Inputs(ref_image=encoded(reference)))
    assert caught.value.is_final_here


def zero_cond_t(tiny: Tiny, folder: Path) -> Tiny:
    """The same weights in a denoiser that reads the reference as at time step zero."""
    denoiser = QwenImageTransformer2DModel.from_config({**transformer_config(), "zero_cond_t": True}).eval()
    denoiser.load_state_dict(tiny.parts["transformer"].state_dict())
    return replace(tiny, parts={**tiny.parts, "transformer": denoiser}, folder=folder)


def test_zero_cond_t_of_a_source_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...], reference: Image.Image, tmp_path: Path
) -> None:
    """cliDefaults.zeroCondT makes the library's picture with that switch, for that source alone, and
    generationMeta says so.
    """
    inputs = Inputs(ref_image=encoded(reference))
    switched = make(engine, files, inputs=inputs, defaults=DEFAULTS.model_copy(update={"zero_cond_t": True}))
    assert same(switched, edited(zero_cond_t(tiny, tmp_path), reference))
    plain = make(engine, files, inputs=inputs)
    assert same(plain, edited(tiny, reference))
    assert (switched.meta.get("zeroCondT"), plain.meta.get("zeroCondT")) == (True, None)


def test_zero_cond_t_is_told_by_the_file(
    tiny: Tiny, files: tuple[LocalFile, ...], reference: Image.Image, tmp_path: Path
) -> None:
    """ComfyUI's files of Qwen-Image-Edit-2511 say so themselves, by an empty tensor."""
    narrow = tiny_qwen_image(tmp_path, QWEN_IMAGE_EDIT_2511)
    engine = DiffusionEngine("cpu", families=(tiny.family, narrow.family))
    parts = (narrow.file("transformer"), *files[1:])
    picture = make(engine, parts, inputs=Inputs(ref_image=encoded(reference)))
    assert (picture.meta["family"], picture.meta["zeroCondT"]) == (narrow.family.name, True)
    assert same(picture, edited(zero_cond_t(tiny, tmp_path), reference))


def test_picture_takes_as_many_tokens_as_the_vision_encoder_gives(tiny: Tiny) -> None:
    """Of each picture the prompt holds one token for every four patches, in the pictures' order."""
    processor = PictureProcessor(
        load_tokenizer(QWEN_TOKENIZER), tiny.parts["text_encoder"].config.vision_config
    )
    prompt = "<|vision_start|><|image_pad|><|vision_end|> and <|vision_start|><|image_pad|><|vision_end|>"
    inputs = processor([prompt], [scene(112, 56), scene(56, 84)], padding=True, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 8], [1, 6, 4]]
    assert inputs["pixel_values"].shape == (4 * 8 + 6 * 4, 3 * 2 * 14 * 14)
    # A prompt that speaks of places for pictures adds none.
    more = processor(
        [f"{prompt} <|image_pad|>"], [scene(112, 56), scene(56, 84)], padding=True, return_tensors="pt"
    )
    assert (more["input_ids"] == tiny.parts["text_encoder"].config.image_token_id).sum() == 8 + 6
    pads = (inputs["input_ids"][0] == tiny.parts["text_encoder"].config.image_token_id).long()
    runs = [len(run) for run in "".join(map(str, pads.tolist())).split("0") if run]
    assert runs == [8, 6]


@pytest.mark.parametrize("mode", [Mode.COMPONENT, Mode.LAYERS])
def test_offloaded_edit_is_the_same(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...], reference: Image.Image, mode: Mode
) -> None:
    """On a card too small for the model, text encoder in two parts as it is, an edit is the same picture."""
    parts = (denoiser_gguf(tiny, Q8), language_gguf(tiny, Q8), vision_gguf(tiny, Q8), files[2])
    whole = make(engine, parts, inputs=Inputs(ref_image=encoded(reference)))
    assert same(whole, offloaded(tiny.family, parts, mode, Starting(reference=reference)))


@pytest.mark.parametrize("flow_shift", [3.0, 1.0])
def test_flow_shift_is_stable_diffusion_cpps(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...], flow_shift: float
) -> None:
    """cliDefaults.flowShift holds for every size of picture, as stable-diffusion.cpp's --flow-shift."""
    expected = guided(tiny, shift=flow_shift)
    defaults = DEFAULTS.model_copy(update={"flow_shift": flow_shift})
    assert same(make(engine, files, defaults=defaults), expected)


KINDS: tuple[JobKind, JobKind] = ("text", "edit")


def test_edit_needs_memory_for_its_reference(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """The memory estimated for an edit counts the reference that the denoiser sees beside its own picture."""
    blueprint = identify(files, [tiny.family])
    alone, beside = (footprint(blueprint, "bfloat16", 1024 * 1024, kind=kind) for kind in KINDS)
    assert beside.denoising > 1.8 * alone.denoising
    assert beside.decoding == alone.decoding
