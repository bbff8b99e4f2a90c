"""What is planned for a picture is what it takes: measured by the libraries' own code, at full size.

On the meta device, where tensors have sizes and no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
from PIL import Image
from safetensors.torch import load_file, save_file

from studio_worker.engine.families import FAMILIES, identify
from studio_worker.engine.families.component import Part, read_json
from studio_worker.engine.families.family import Blueprint, Family, JobKind
from studio_worker.engine.families.flux import FLUX_DEV
from studio_worker.engine.families.qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT_2511, QwenImage
from studio_worker.engine.families.sdxl import SDXL
from studio_worker.engine.families.stable_diffusion import SD1
from studio_worker.engine.families.z_image import Z_IMAGE
from studio_worker.engine.files.checkpoint import Checkpoint
from studio_worker.engine.files.packed import BlockLinear
from studio_worker.engine.files.sections import Section, read_sections
from studio_worker.engine.files.weights import dequantised, read_tensors
from studio_worker.engine.loading import empty_model
from studio_worker.engine.memory.placement import Footprint, Mode, Plan
from studio_worker.engine.parameters import resolve
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.needs import footprint
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.jobs import Cancel, ImageTask
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import scene
from tests.lab.live_memory import META, LiveBytes

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning", "ignore:invalid value:RuntimeWarning"
)

BLOCKS = ("num_layers", "num_single_layers", "n_layers", "num_hidden_layers", "depth")
"""What configurations call the number of equal blocks; one is as large at its peak as dozens."""


class Measured(NamedTuple):
    """What lived while a picture was made, and what was planned for it."""

    planned: Footprint
    whole: int
    stages: dict[str, int]


def few_blocks(part: Part) -> dict[str, Any]:
    config = read_json(part.config / "config.json")
    few = {name: min(config[name], 3) for name in BLOCKS if name in config}
    if "layer_types" in config:
        few["layer_types"] = config["layer_types"][:3]
    if "transformer_layers_per_block" in config:
        few["transformer_layers_per_block"] = 1
    if "pos_embed_max_size" in config:
        few["pos_embed_max_size"] = 64  # tokens along a side of 1024 pixels; to compute more takes seconds
    return config | few


def section(name: str, module: torch.nn.Module) -> Section:
    """What a file of the module's own tensors would be."""
    shapes = {each: tuple(tensor.shape) for each, tensor in module.state_dict().items()}
    path = Path(name)
    return Section(LocalFile("model", path, name), Checkpoint(path, "safetensors", shapes), "", shapes)


def starting(kind: JobKind, side: int) -> Starting:
    picture = scene(side, side)
    return {
        "text": Starting(),
        "image": Starting(picture),
        "inpaint": Starting(picture, Image.new("L", (side, side), 255)),
        "edit": Starting(reference=scene(1024, 1024)),
    }[kind]


def model(family: Family, computed_in: str) -> dict[str, Any]:
    """The components of a family, without numbers, and few of their blocks."""
    dtype = getattr(torch, computed_in)
    return {
        name: empty_model(part, few_blocks(part)).to(dtype).to(META).eval().requires_grad_(False)
        for name, part in family.parts.items()
    }


def measured(
    family: Family,
    parts: dict[str, Any],
    side: int,
    kind: JobKind,
    computed_in: str,
    *,
    tiled: bool = False,
    guided: bool = True,
) -> Measured:
    """A picture of one step, of a long prompt."""
    words = "red potion " * (150 if family.flow else 60)
    asked = {"prompt": words, "negative_prompt": words, "width": side, "height": side, "steps": 1}
    task = ImageTask(**asked, cfg_scale=5.0 if guided else 1.0)
    parameters = resolve(task, CliDefaults(), family.defaults, from_image=kind != "text")
    live, stages = LiveBytes(), dict[str, int]()
    live.hold(parts.values())
    weights = live.peak
    watched = [(parts[family.denoiser], "forward"), (parts["vae"], "encode"), (parts["vae"], "decode")]
    with pytest.MonkeyPatch.context() as patch, live.counting():
        for module, method in watched:
            name = "denoising" if method == "forward" else "decoding"
            patch.setattr(module, method, live.watched(getattr(module, method), stages, name))
        plan = Plan(Mode.WHOLE, tiled=tiled, peak_bytes=0)
        LoadedModel(family, parts, plan, META).render(
            parameters, starting(kind, side), lambda done, total: None, Cancel()
        )
    blueprint = Blueprint(family, {name: section(name, module) for name, module in parts.items()})
    planned = footprint(blueprint, computed_in, side * side, kind=kind, guided=guided)
    return Measured(planned, live.peak, {name: peak - weights for name, peak in stages.items()})


def read_elsewhere(
    family: QwenImage,
    pipeline: Any,
    texts: Sequence[str],
    device: torch.device,
    reference: Any,
) -> list[dict[str, Any]]:
    """Embeddings of a prompt with a picture: how many there are depends on the tokens' numbers."""
    tokens, dtype = 512 if reference is None else 700, pipeline.transformer.dtype
    width = pipeline.transformer.config.joint_attention_dim
    return [
        {"encoder_hidden_states": torch.zeros(1, tokens, width, dtype=dtype, device=device)} for _ in texts
    ]


@pytest.fixture(autouse=True)
def _qwen_reads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QwenImage, "read", read_elsewhere)


LEAST, MOST, MOST_DENOISING = 0.98, 1.06, 1.2
"""Of what was found: never clearly too little planned, and not much too much. How long the prompt is makes a
difference while the denoiser works, and is not planned with."""


def kind_of(family: Family) -> JobKind:
    return "text" if family.pipelines.text else "inpaint"


ONE_OF_EACH = {tuple(part.identity for part in family.parts.values()): family for family in FAMILIES}
"""Families that differ in their components, and not in their scheduler alone."""


@pytest.mark.parametrize("family", ONE_OF_EACH.values(), ids=lambda family: family.name)
def test_plan_is_what_a_picture_takes(family: Family) -> None:
    """For every family a picture takes what was planned: as a whole, its denoiser, and its VAE."""
    half, guided = family.halves[0], family.name != "flux1-fill"
    parts = model(family, half)
    for side in (512, 1024):
        found = measured(family, parts, side, kind_of(family), half, guided=guided)
        planned = found.planned
        assert LEAST <= planned.plans()[0].peak_bytes / found.whole <= MOST
        assert LEAST <= planned.denoising / found.stages["denoising"] <= MOST_DENOISING
        assert LEAST <= planned.decoding / found.stages["decoding"] <= MOST


@pytest.mark.parametrize("family", [SD1, QWEN_IMAGE], ids=lambda family: family.name)
def test_tiles_are_what_decoding_piece_by_piece_takes(family: Family) -> None:
    """Where the VAE decodes in tiles, that takes what was planned for it."""
    half = family.halves[0]
    found = measured(family, model(family, half), 1024, "text", half, tiled=True)
    assert LEAST <= found.planned.tile / found.stages["decoding"] <= MOST
    assert found.planned.tile < found.planned.decoding / 2


@pytest.mark.parametrize("family", [FLUX_DEV, QWEN_IMAGE_EDIT_2511], ids=lambda family: family.name)
def test_edit_takes_what_was_planned(family: Family) -> None:
    """An edit has its reference to encode, which may be more than to decode the picture, and to look at."""
    half = family.halves[0]
    found = measured(family, model(family, half), 512, "edit", half)
    assert LEAST <= found.planned.denoising / found.stages["denoising"] <= MOST_DENOISING
    assert LEAST <= found.planned.decoding / found.stages["decoding"] <= MOST


@pytest.mark.parametrize("family", [SD1, FLUX_DEV, Z_IMAGE, QWEN_IMAGE], ids=lambda family: family.name)
def test_plan_holds_in_single_precision(family: Family) -> None:
    """On a CPU, and on a card without sound half precision, a picture takes what was planned, too."""
    found = measured(family, model(family, "float32"), 512, "text", "float32", guided=False)
    assert LEAST <= found.planned.denoising / found.stages["denoising"] <= MOST_DENOISING
    assert LEAST <= found.planned.decoding / found.stages["decoding"] <= MOST


READERS = {
    part.identity: (family, name)
    for family in (SD1, SDXL, FLUX_DEV, Z_IMAGE, QWEN_IMAGE)
    for name, part in family.parts.items()
    if name.startswith("text_encoder")
}


@pytest.mark.parametrize(("family", "name"), READERS.values(), ids=[name.split()[0] for name in READERS])
def test_plan_has_room_for_reading_the_prompt(family: Family, name: str) -> None:
    """A text encoder reading as much as it can in one go takes no more than was planned."""
    parts, half = model(family, family.halves[0]), family.halves[0]
    part, config = parts[name], parts[name].config
    windows = (
        (4, 77) if config.model_type.startswith("clip") else (1, 512 if config.model_type == "t5" else 1400)
    )
    live = LiveBytes()
    with torch.no_grad(), live.counting():
        tokens, mask = (torch.ones(windows, dtype=torch.int64, device=META) for _ in range(2))
        part(tokens, attention_mask=mask, output_hidden_states=True)
    blueprint = Blueprint(family, {each: section(each, module) for each, module in parts.items()})
    planned = footprint(blueprint, half, 512 * 512).reading[name]
    assert LEAST <= planned / live.peak <= 1.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", sorted(kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES))
def test_plan_has_room_for_multiplying_out_blocks(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Multiplying out a quantised matrix, as is done at each use, takes no more than was planned for it."""
    rows, columns = 512, 2048
    quantised = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantised]
    blocks = torch.zeros(rows, columns // block * block_bytes, dtype=torch.uint8, device=META)
    layer, live = BlockLinear(torch.nn.Linear(columns, rows, device=META), dtype), LiveBytes()
    layer.hold(GGUFParameter(blocks, quant_type=quantised), META)
    with torch.no_grad(), live.counting():
        layer(torch.zeros(1, columns, dtype=dtype, device=META))
    shapes = {"large.weight": (rows, columns), "small.weight": (64, 256)}
    checkpoint = Checkpoint(tmp_path, "gguf", shapes, dict.fromkeys(shapes, kind))
    denoiser = Section(LocalFile("model", tmp_path, ""), checkpoint, "", shapes)
    planned = footprint(Blueprint(SD1, {"unet": denoiser}), str(dtype).removeprefix("torch."), 512 * 512)
    assert LEAST <= planned.unpacking["unet"] / live.peak <= 2.1


def test_reading_a_quantised_vocabulary_takes_little_more_than_it() -> None:
    """A table that is looked up in is multiplied out while it is read, piece by piece: Qwen's would take
    gigabytes at once, which nothing is planned for.
    """
    columns, quantised = 3584, gguf.GGMLQuantizationType.Q6_K
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantised]
    blocks = torch.zeros(151_936, columns // block * block_bytes, dtype=torch.uint8, device=META)
    live = LiveBytes()
    with torch.no_grad(), live.counting():
        table = dequantised(GGUFParameter(blocks, quant_type=quantised), torch.bfloat16)
    assert live.peak <= 1.1 * table.nbytes


def test_layer_by_layer_takes_as_much_as_the_largest_layers(tmp_path: Path) -> None:
    """Layer by layer, a component's two largest layers are planned to be on the device: Qwen's vocabulary and
    a matrix, in the case of Z-Image, which are more than any layers of its denoiser.
    """
    vocabulary = (151_936, 2560)
    blocks = {f"{number}.weight": (9728, 2560) for number in range(108)}
    shapes = {
        "transformer": {"wide.weight": (10_240, 3840), "narrow.weight": (3840, 3840)},
        "text_encoder": {"embed_tokens.weight": vocabulary, **blocks},
        "vae": {"conv.weight": (512, 512, 3, 3)},
    }
    sections = {
        name: Section(LocalFile("model", tmp_path, name), Checkpoint(tmp_path, "safetensors", each), "", each)
        for name, each in shapes.items()
    }
    needed = footprint(Blueprint(Z_IMAGE, sections), "bfloat16", 512 * 512)
    plan = next(plan for plan in needed.plans() if plan.mode is Mode.LAYERS)
    largest_bytes = 2 * (math.prod(vocabulary) + 9728 * 2560)
    assert plan.peak_bytes == largest_bytes + needed.reading["text_encoder"]


@pytest.mark.parametrize("head", ["lm_head.weight", "model.lm_head.weight"])
def test_head_of_a_language_model_takes_nothing(head: str, tmp_path: Path) -> None:
    """The file of a text encoder may hold what guesses the next word, a gigabyte that is never loaded."""
    made = tiny("z-image", tmp_path)
    files = made.files()
    plain = footprint(identify(files, (made.family,)), "bfloat16", 64 * 64)
    (encoder,) = (file for file in files if file.role == "text-encoder")
    tensors = load_file(encoder.path)
    (table,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    headed = encoder._replace(path=tmp_path / "headed.safetensors")
    save_file(tensors | {head: table.clone()}, headed.path)
    others = (file for file in files if file != encoder)
    with_head = footprint(identify((*others, headed), (made.family,)), "bfloat16", 64 * 64)
    assert [plan.peak_bytes for plan in with_head.plans()] == [plan.peak_bytes for plan in plain.plans()]
    (loaded,) = read_sections([headed])
    assert not [
        name for name in read_tensors(loaded, torch.device("cpu"), torch.float32) if "lm_head" in name
    ]
