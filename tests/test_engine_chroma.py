"""Chroma: a tiny random model in the published layout, beside the library's own pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.black_forest import from_black_forest
from studio_worker.engine.families.chroma import CHROMA, Chroma, chroma
from studio_worker.engine.families.t5 import T5_TOKENIZER
from studio_worker.models import LocalFile
from tests import published
from tests.engine_lab import encoded, scene
from tests.flow_models import (
    GUIDANCE,
    HEIGHT,
    T5,
    VAE,
    WIDTH,
    black_forest,
    compvis_vae,
    config,
    difference,
    drawn,
    make,
    one_column,
    right_half,
    safetensors,
    same,
    state,
    stock,
)
from tests.quantising import DECODING, Q8, Kind, dequantised, llama_cpp, write_gguf

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

TRANSFORMER = {
    "_class_name": "ChromaTransformer2DModel",
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 6, 6],
    "approximator_num_channels": 32,
    "approximator_hidden_dim": 32,
    "approximator_layers": 2,
}


@dataclass(frozen=True)
class Tiny:
    """The library's own modules, and a family of their sizes."""

    parts: dict[str, Any]
    family: Chroma
    folder: Path

    def pipeline(self, cls: Any) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(CHROMA.scheduler))
        return cls(**self.parts, scheduler=scheduler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("chroma")
    torch.manual_seed(0)
    parts = {
        "transformer": drawn(ChromaTransformer2DModel.from_config(TRANSFORMER), 1),
        "text_encoder": drawn(T5EncoderModel(T5Config(**T5)), 2),
        "vae": drawn(AutoencoderKL.from_config(VAE), 3),
        "tokenizer": T5Tokenizer.from_pretrained(str(T5_TOKENIZER.folder)),
    }
    family = chroma(
        "tiny-chroma",
        config(folder / "transformer", TRANSFORMER),
        config(folder / "text_encoder", T5),
        config(folder / "vae", VAE),
    )
    return Tiny(parts, family, folder)


@pytest.fixture(scope="module")
def files(tiny: Tiny) -> tuple[LocalFile, ...]:
    """``Chroma1-HD.safetensors`` as lodestones publishes it (FLUX.1's names and its own, no prefix), with T5
    and ``ae.safetensors`` beside it.
    """
    transformer = black_forest(state(tiny.parts["transformer"]))
    return (
        safetensors(tiny.folder / "chroma.safetensors", "diffusion-model", transformer),
        safetensors(tiny.folder / "t5xxl.safetensors", "text-encoder", state(tiny.parts["text_encoder"])),
        safetensors(tiny.folder / "ae.safetensors", "vae", compvis_vae(state(tiny.parts["vae"]), 4)),
    )


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> DiffusionEngine:
    return DiffusionEngine("cpu", families=(tiny.family,))


GUIDED = {"guidance_scale": GUIDANCE, "negative_prompt": ""}


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_picture_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...], guidance: float
) -> None:
    """From the published files a picture is, pixel for pixel, what the library's pipeline makes."""
    expected = stock(tiny.pipeline(ChromaPipeline), guidance_scale=guidance, negative_prompt="")
    assert same(make(engine, files, cfg_scale=guidance), expected)


def test_picture_from_picture_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]
) -> None:
    """Image-to-image is the library's, pixel for pixel."""
    start = scene(WIDTH, HEIGHT)
    expected = stock(tiny.pipeline(ChromaImg2ImgPipeline), **GUIDED, image=start, strength=0.7)
    assert same(make(engine, files, inputs=Inputs(encoded(start)), denoise=0.7), expected)


def test_picture_within_mask_is_the_librarys(
    tiny: Tiny, engine: DiffusionEngine, files: tuple[LocalFile, ...]
) -> None:
    """Inpainting is the library's where the mask is white, and untouched elsewhere."""
    tiny.parts["transformer"].register_to_config(guidance_embeds=False)  # which the pipeline wants to know
    start, mask = scene(WIDTH, HEIGHT), right_half()
    expected = stock(
        tiny.pipeline(ChromaInpaintPipeline),
        **GUIDED,
        image=start,
        mask_image=mask,
        strength=0.7,
        max_sequence_length=512,  # as all its other pipelines
    )
    picture = make(engine, files, inputs=Inputs(encoded(start), encoded(mask)), denoise=0.7)
    assert same(picture, Image.composite(expected, start, mask))


@pytest.mark.parametrize(("kind", "bound"), [(None, 0.0), (Q8, 3.0)])
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
    transformer = black_forest(state(tiny.parts["transformer"]))
    language = llama_cpp(state(tiny.parts["text_encoder"]), gguf.MODEL_ARCH.T5ENCODER, T5["num_layers"])
    parts = (
        write_gguf(tiny.folder / f"dit-{kind}.gguf", "diffusion-model", transformer, "chroma", kind),
        write_gguf(tiny.folder / f"t5-{kind}.gguf", "text-encoder", language, "t5encoder", kind),
        files[2],
    )
    picture = make(engine, parts)
    assert difference(picture, stock(tiny.pipeline(ChromaPipeline), **GUIDED)) <= bound
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
