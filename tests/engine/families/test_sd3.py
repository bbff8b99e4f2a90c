"""Stable Diffusion 3 and 3.5: tiny random models in the published layouts, beside the library's pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
)

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from studio_worker.errors import JobError
from studio_worker.gpu_check.tiny.encoders import CLIP
from studio_worker.gpu_check.tiny.layouts import stability
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.gpu_check.tiny.quantised import Kind, write_gguf
from studio_worker.gpu_check.tiny.sd3 import tiny_sd3
from studio_worker.gpu_check.tiny.weights import safetensors, state
from studio_worker.models import LocalFile
from tests.lab.engine import encoded, scene
from tests.lab.flow_models import GUIDANCE, HEIGHT, WIDTH, difference, make, pipeline, right_half, same, stock
from tests.lab.quantising import DECODING, Q8, dequantised

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

VARIANTS = {"medium": SD3_MEDIUM, "large-3.5": SD35_LARGE, "medium-3.5": SD35_MEDIUM}


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    return {name: tiny_sd3(tmp_path_factory.mktemp(name), like) for name, like in VARIANTS.items()}


@pytest.fixture(scope="module")
def engine(tinies: dict[str, Tiny]) -> DiffusionEngine:
    return DiffusionEngine("cpu", families=[tiny.family for tiny in tinies.values()])


@pytest.fixture(scope="module")
def text_files(tinies: dict[str, Tiny]) -> tuple[LocalFile, ...]:
    """``clip_l``, ``clip_g`` and ``t5xxl_fp16.safetensors``."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return tuple(tinies["medium"].file(name) for name in names)


def checkpoint(tiny: Tiny) -> LocalFile:
    """Denoiser and VAE in one file of role model, as ``sd3.5_large.safetensors``; text encoders are beside
    it.
    """
    packed = {
        "model.diffusion_model.": tiny.published["transformer"].tensors,
        "first_stage_model.": tiny.published["vae"].tensors,
    }
    tensors = {prefix + name: tensor for prefix, part in packed.items() for name, tensor in part.items()}
    return safetensors(tiny.folder / f"{tiny.family.name}.safetensors", "model", tensors)


GUIDED = {"guidance_scale": GUIDANCE, "negative_prompt": ""}


@pytest.mark.parametrize("name", VARIANTS)
def test_picture_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, text_files: tuple[LocalFile, ...], name: str
) -> None:
    """From the published files a picture is, pixel for pixel, what the library's pipeline makes."""
    picture = make(engine, [checkpoint(tinies[name]), *text_files])
    assert same(picture, stock(pipeline(tinies[name], StableDiffusion3Pipeline), **GUIDED))
    assert picture.meta["family"] == tinies[name].family.name


def test_picture_without_t5_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, text_files: tuple[LocalFile, ...]
) -> None:
    """Without T5, which a source may leave out, a picture is the library's without it."""
    tiny = tinies["large-3.5"]
    expected = stock(
        pipeline(tiny, StableDiffusion3Pipeline, text_encoder_3=None, tokenizer_3=None), **GUIDED
    )
    assert same(make(engine, [checkpoint(tiny), *text_files[:2]]), expected)


def test_clip_without_projection_gets_the_identity(
    tinies: dict[str, Tiny], engine: DiffusionEngine, text_files: tuple[LocalFile, ...]
) -> None:
    """The CLIP-L made for FLUX.1 lacks the projection; Stability AI's is the identity, which it then gets."""
    tiny = tinies["medium"]
    tensors = state(tiny.parts["text_encoder"])
    tensors["text_projection.weight"] = torch.eye(CLIP["projection_dim"])
    whole = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)).eval()
    whole.load_state_dict(tensors)
    del tensors["text_projection.weight"]
    bare = safetensors(tiny.folder / "bare.safetensors", "text-encoder", tensors)
    picture = make(engine, [checkpoint(tiny), bare, *text_files[1:]])
    assert same(picture, stock(pipeline(tiny, StableDiffusion3Pipeline, text_encoder=whole), **GUIDED))


def test_picture_from_picture_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, text_files: tuple[LocalFile, ...]
) -> None:
    """Image-to-image, and inpainting where the mask is white, are the library's, pixel for pixel."""
    tiny = tinies["medium-3.5"]
    start, mask = scene(WIDTH, HEIGHT), right_half()
    files = [checkpoint(tiny), *text_files]
    expected = stock(pipeline(tiny, StableDiffusion3Pipeline), **GUIDED, picture=start, denoise=0.7)
    assert same(make(engine, files, inputs=Inputs(encoded(start)), denoise=0.7), expected)
    asked = {"picture": start, "mask": mask, "denoise": 0.7}
    painted = stock(pipeline(tiny, StableDiffusion3Pipeline), **GUIDED, **asked)
    picture = make(engine, files, inputs=Inputs(encoded(start), encoded(mask)), denoise=0.7)
    assert same(picture, Image.composite(painted, start, mask))


@pytest.mark.parametrize(("kind", "bound"), [(None, 0.001), (Q8, 3.0)])
def test_gguf_makes_the_librarys_picture(
    tinies: dict[str, Tiny],
    engine: DiffusionEngine,
    text_files: tuple[LocalFile, ...],
    kind: Kind | None,
    bound: float,
) -> None:
    """A GGUF denoiser, as city96/stable-diffusion-3.5-large-gguf has it (Stability AI's names), makes the
    library's picture: exactly in single precision, nearly where quantised, and hardly another one than the
    numbers that it was made to.
    """
    tiny = tinies["large-3.5"]
    tensors = tiny.published["transformer"].tensors
    denoiser = write_gguf(tiny.folder / f"dit-{kind}.gguf", "diffusion-model", tensors, "sd3", kind)
    vae = tiny.file("vae")
    picture = make(engine, [denoiser, vae, *text_files])
    assert difference(picture, stock(pipeline(tiny, StableDiffusion3Pipeline), **GUIDED)) <= bound
    meant = make(engine, [dequantised(denoiser), vae, *text_files])
    assert difference(picture, meant) <= (DECODING if kind else 0)


def test_layout_of_these_tests_is_the_librarys(tinies: dict[str, Tiny]) -> None:
    """The published layout that these tests write is the one that the library's converter reads."""
    for tiny in tinies.values():
        tensors = state(tiny.parts["transformer"])
        renamed = convert_sd3_transformer_checkpoint_to_diffusers(dict(stability(tensors)))
        assert renamed.keys() == tensors.keys()
        assert [name for name in tensors if not torch.equal(renamed[name], tensors[name])] == []


def test_tensor_of_a_strange_name_is_refused(
    tinies: dict[str, Tiny], engine: DiffusionEngine, text_files: tuple[LocalFile, ...]
) -> None:
    """A denoiser with a tensor that the library's renaming cannot read is refused with what it stumbled
    over, and no worker tries it again.
    """
    tiny = tinies["medium"]
    tensors = dict(tiny.published["transformer"].tensors)
    tensors["joint_blocks.x.x_block.attn.qkv.weight"] = torch.zeros(3, 4)
    strange = safetensors(tiny.folder / "strange.safetensors", "diffusion-model", tensors)
    vae = tiny.file("vae")
    with pytest.raises(JobError, match=r"holds no whole .*: ValueError") as caught:
        make(engine, [strange, vae, *text_files])
    assert caught.value.is_final_here


def test_picture_beyond_the_table_of_places_is_refused(
    tinies: dict[str, Tiny],
    engine: DiffusionEngine,
    text_files: tuple[LocalFile, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture larger than the model has places for is refused with the limit, before anything is loaded."""
    places = tinies["medium"].parts["transformer"].config.pos_embed_max_size
    limit = places * 2 * 8  # of a patch of two cells, and a cell of eight pixels
    assert SD3_MEDIUM.name == "sd3-medium"
    files = [checkpoint(tinies["medium"]), *text_files]
    assert make(engine, files, width=limit, height=64, steps=1).meta["width"] == limit
    monkeypatch.setattr("studio_worker.engine.rendering.loader.load_part", pytest.fail)
    with pytest.raises(JobError, match=rf"places for pictures of {limit}x{limit} px at most") as caught:
        make(engine, files, width=limit + 8, height=64)
    assert caught.value.is_jobs_fault
