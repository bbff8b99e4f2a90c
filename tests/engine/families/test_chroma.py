"""Chroma: a tiny random model in the published layout, beside the library's own pipelines."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import ChromaPipeline
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers
from PIL import Image

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.parts.black_forest import from_black_forest
from studio_worker.gpu_check.tiny.flux import tiny_chroma
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.gpu_check.tiny.quantised import Kind, write_gguf
from studio_worker.models import LocalFile
from tests.lab import published
from tests.lab.engine import encoded, scene
from tests.lab.flow_models import (
    GUIDANCE,
    HEIGHT,
    WIDTH,
    difference,
    make,
    one_column,
    pipeline,
    right_half,
    same,
    stock,
)
from tests.lab.quantising import DECODING, Q8, dequantised

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_chroma(tmp_path_factory.mktemp("chroma"))


@pytest.fixture(scope="module")
def files(tiny: Tiny) -> tuple[LocalFile, ...]:
    return tiny.files()


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> DiffusionEngine:
    return DiffusionEngine("cpu", families=(tiny.family,))


SHIFT = math.exp(1.0)
"""Chroma's own, whatever the picture's size."""
GUIDED = {"guidance_scale": GUIDANCE, "negative_prompt": "", "shift": SHIFT}


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_picture_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...], guidance: float
) -> None:
    """From the published files a picture is, pixel for pixel, what the library's pipeline makes."""
    expected = stock(pipeline(tiny, ChromaPipeline), guidance_scale=guidance, negative_prompt="", shift=SHIFT)
    assert same(make(engine, files, cfg_scale=guidance), expected)


def test_picture_from_picture_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]
) -> None:
    """Image-to-image is the library's, pixel for pixel."""
    start = scene(WIDTH, HEIGHT)
    expected = stock(pipeline(tiny, ChromaPipeline), **GUIDED, picture=start, denoise=0.7)
    assert same(make(engine, files, inputs=Inputs(encoded(start)), denoise=0.7), expected)


def test_picture_within_mask_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]
) -> None:
    """Inpainting is the library's where the mask is white, and untouched elsewhere."""
    start, mask = scene(WIDTH, HEIGHT), right_half()
    expected = stock(pipeline(tiny, ChromaPipeline), **GUIDED, picture=start, mask=mask, denoise=0.7)
    picture = make(engine, files, inputs=Inputs(encoded(start), encoded(mask)), denoise=0.7)
    assert same(picture, Image.composite(expected, start, mask))


@pytest.mark.parametrize(("kind", "bound"), [(None, 0.001), (Q8, 3.0)])
def test_gguf_makes_the_librarys_picture(
    tiny: Tiny,
    engine: DiffusionEngine,
    files: tuple[LocalFile, ...],
    kind: Kind | None,
    bound: float,
) -> None:
    """GGUF files make the library's picture: exactly in single precision, nearly where quantised, and hardly
    another one than the numbers that they were made to.
    """
    denoiser, t5 = tiny.published["transformer"], tiny.published["text_encoder"]
    parts = (
        write_gguf(tiny.folder / f"dit-{kind}.gguf", denoiser.role, denoiser.tensors, "chroma", kind),
        write_gguf(tiny.folder / f"t5-{kind}.gguf", t5.role, t5.in_gguf or {}, "t5encoder", kind),
        files[2],
    )
    picture = make(engine, parts)
    assert difference(picture, stock(pipeline(tiny, ChromaPipeline), **GUIDED)) <= bound
    meant = make(engine, [*map(dequantised, parts[:2]), parts[2]])
    assert difference(picture, meant) <= (DECODING if kind else 0)


def test_names_are_translated_as_the_library_does() -> None:
    """The published names become diffusers' as the library's own converter turns them, value for value."""
    tensors = one_column(published.chroma(double=2, single=2))
    ours, theirs = (
        from_black_forest(tensors),
        convert_chroma_transformer_checkpoint_to_diffusers(dict(tensors)),
    )
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
