"""The large families at full size, without weights: what is carried here against what is published there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from studio_worker.engine.families import identify
from studio_worker.engine.families.chroma import CHROMA
from studio_worker.engine.families.component import Part
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.flux import FLUX_DEV, FLUX_FILL, FLUX_SCHNELL
from studio_worker.engine.families.qwen_image import QWEN_IMAGE
from studio_worker.engine.families.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from studio_worker.engine.files.sections import read_sections
from studio_worker.engine.loading import empty_model, load_tokenizer
from studio_worker.errors import JobError
from studio_worker.models import FileRole, LocalFile
from tests.lab.engine import write_header
from tests.lab.published import Shapes, chroma, flux1, qwen25_vl, qwen_image, sd3, t5_xxl


@pytest.fixture(autouse=True)
def _no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 3's tables of places are not computed: seconds each, for numbers that nobody reads."""

    def places(width: int, side: int, **_: object) -> torch.Tensor:
        return torch.empty(side**2, width)

    monkeypatch.setattr("diffusers.models.embeddings.get_2d_sincos_pos_embed", places)


PUBLISHED: list[tuple[Family, str, Callable[[], Shapes]]] = [
    (FLUX_DEV, "transformer", flux1),
    (FLUX_SCHNELL, "transformer", lambda: flux1(guidance=False)),
    (FLUX_FILL, "transformer", lambda: flux1(reads=384)),
    (FLUX_DEV, "text_encoder_2", t5_xxl),
    (SD35_LARGE, "transformer", sd3),
    (SD35_MEDIUM, "transformer", lambda: sd3(blocks=24, positions=384, dual=13)),
    (SD3_MEDIUM, "transformer", lambda: sd3(blocks=24, normed=False)),
    (CHROMA, "transformer", chroma),
    (QWEN_IMAGE, "transformer", qwen_image),
    (QWEN_IMAGE, "text_encoder", qwen25_vl),
    (QWEN_IMAGE, "vision", qwen25_vl),
]


@pytest.mark.parametrize(
    ("family", "name", "published"), PUBLISHED, ids=[f"{family.name}-{name}" for family, name, _ in PUBLISHED]
)
def test_published_tensors_are_what_the_configuration_builds(
    family: Family, name: str, published: Callable[[], Shapes], tmp_path: Path
) -> None:
    """A published file's tensors, renamed, are by name and shape those of the component that is built for
    them.
    """
    part = family.parts[name]
    [section] = [
        each for each in read_sections([header(tmp_path, published(), part.role)]) if part.fits(each)
    ]
    layout = part.layout(section)
    assert layout is not None
    renamed = layout.rename({key: torch.empty(section.shapes[key], device="meta") for key in section.loaded})
    model = empty_model(part)
    saved = model.state_dict(keep_vars=True)  # parameters, and the buffers that a class saves
    built = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    assert {key: tuple(tensor.shape) for key, tensor in renamed.items()} == built


@pytest.mark.parametrize(
    ("shapes", "total_bytes"),
    [(qwen_image(), 40_860_802_176), (qwen25_vl(), 16_584_333_312)],
    ids=["Qwen-Image", "Qwen2.5-VL-7B"],
)
def test_written_down_shapes_add_up_to_the_published_size(shapes: Shapes, total_bytes: int) -> None:
    """The lists of tensors that the tests use are whole: they add up to the size that their index file
    states.
    """
    assert 2 * numbers(shapes) == total_bytes


FILES: list[tuple[Part, int, int]] = [
    # bytes of the file as its repository lists them, and for each number in it
    (FLUX_DEV.parts["transformer"], 23_802_932_552, 2),  # flux1-dev.safetensors
    (FLUX_DEV.parts["text_encoder"], 246_144_152, 2),  # clip_l.safetensors
    (FLUX_DEV.parts["vae"], 335_304_388, 4),  # ae.safetensors
    (QWEN_IMAGE.parts["vae"], 253_806_246, 2),  # qwen_image_vae.safetensors
]


@pytest.mark.parametrize(("part", "file_bytes", "width"), FILES, ids=[part.kind for part, _, _ in FILES])
def test_component_is_as_large_as_the_published_file(part: Part, file_bytes: int, width: int) -> None:
    """A component at full size takes what the published file has, but for a header below 128 KiB."""
    weights = sum(parameter.numel() for parameter in empty_model(part).parameters()) * width
    assert 0 < file_bytes - weights < 128 * 1024


def test_tokenizers_know_their_words() -> None:
    """The carried tokenizers give the ids of the published ones: T5's with its end, Qwen's with its marks."""
    t5 = load_tokenizer(FLUX_DEV.tokenizers["tokenizer_2"])
    assert t5("a red potion").input_ids == [3, 9, 1131, 6532, 106, 1]
    assert t5("ﬁne x²").input_ids == [1399, 3, 226, 357, 1]  # compatibility forms are folded
    qwen = load_tokenizer(QWEN_IMAGE.tokenizers["tokenizer"])
    ids = [151644, 872, 198, 151652, 151655, 151653, 64, 2518, 60108, 151645]
    assert (
        qwen("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a red potion<|im_end|>").input_ids
        == ids
    )


# --- which one it is ---

WITH_PREFIX = "model.diffusion_model."

DENOISERS: list[tuple[str, Shapes]] = [
    ("flux1-dev", flux1()),  # Kontext's are the same
    ("flux1-schnell", flux1(guidance=False)),
    ("flux1-fill", flux1(reads=384)),
    ("sd3.5-large", sd3()),
    ("sd3.5-medium", sd3(blocks=24, positions=384, dual=13)),
    ("sd3-medium", sd3(blocks=24, normed=False)),
    ("chroma", chroma()),
    ("qwen-image", qwen_image()),  # Qwen-Image-Edit's and 2509's are the same
    ("qwen-image-edit-2511", qwen_image() | {"__index_timestep_zero__": (0,)}),
]


@pytest.mark.parametrize("prefix", ["", WITH_PREFIX])
@pytest.mark.parametrize(("name", "shapes"), DENOISERS, ids=[name for name, _ in DENOISERS])
def test_denoiser_is_told_by_its_tensors(name: str, shapes: Shapes, prefix: str, tmp_path: Path) -> None:
    """Each family is told from its neighbours by its file's header, with and without a prefix."""
    file = header(tmp_path, {prefix + key: shape for key, shape in shapes.items()}, "diffusion-model")
    with pytest.raises(JobError, match=f"^{name} needs a text encoder .*of role text-encoder"):
        identify([file])


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (flux1(reads=128), "FLUX.1 of another kind"),  # Depth and Canny
        (flux1(double=8), "FLUX.1 of another kind"),  # Freepik's FLUX.1-lite
        (chroma(double=8), "Chroma of another kind"),
        (sd3(blocks=30), "Stable Diffusion 3 of another kind"),
        (
            qwen_image() | {"time_text_embed.addition_t_embedding.weight": (2, 3072)},
            "Qwen-Image of another kind",
        ),
        (qwen25_vl(), "a language model alone"),
    ],
    ids=["Depth", "lite", "Chroma", "SD3", "Layered", "text encoder"],
)
def test_neighbour_is_refused_by_name(shapes: Shapes, says: str, tmp_path: Path) -> None:
    """What is near a served family and is none is refused by its own name."""
    with pytest.raises(JobError, match=f"is {says}.* does not serve") as caught:
        identify([header(tmp_path, shapes, "diffusion-model")])
    assert caught.value.is_final_here


def test_text_encoders_find_their_places(tmp_path: Path) -> None:
    """Both text encoders of FLUX.1 have the role text-encoder: which is which, their tensors tell."""
    clip = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.encoder.layers.11.layer_norm1.weight": (768,),
    }
    vae = {
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (128,),
    }
    files = [
        header(tmp_path, t5_xxl(), "text-encoder", "one"),
        header(tmp_path, clip, "text-encoder", "two"),
        header(tmp_path, vae, "vae", "three"),
        header(tmp_path, flux1(), "diffusion-model", "four"),
    ]
    chosen = {name: section.file.content for name, section in identify(files).sections.items()}
    assert chosen == {"transformer": "four", "text_encoder": "two", "text_encoder_2": "one", "vae": "three"}


def header(folder: Path, shapes: Shapes, role: FileRole, name: str = "model") -> LocalFile:
    return LocalFile(role, write_header(folder / f"{name}.safetensors", shapes), name)


def numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
