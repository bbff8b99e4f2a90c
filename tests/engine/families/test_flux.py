"""FLUX.1: tiny random models in the published layouts, beside the library's own pipelines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from PIL import Image

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.flux import FLUX_DEV, FLUX_FILL, FLUX_SCHNELL
from studio_worker.engine.families.parts.black_forest import from_black_forest
from studio_worker.engine.memory.placement import Mode
from studio_worker.errors import JobError
from studio_worker.gpu_check.tiny.flux import tiny_flux
from studio_worker.gpu_check.tiny.layouts import black_forest
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.gpu_check.tiny.quantised import Kind, write_gguf
from studio_worker.gpu_check.tiny.weights import Tensors, in_shards, safetensors, state
from studio_worker.models import LocalFile
from tests.lab.engine import encoded, scene
from tests.lab.flow_models import (
    DEFAULTS,
    GUIDANCE,
    HEIGHT,
    SEED,
    WIDTH,
    difference,
    make,
    offloaded,
    one_column,
    pipeline,
    right_half,
    same,
    stock,
)
from tests.lab.published import flux1
from tests.lab.quantising import DECODING, Q4, Q8, dequantised, widened
from tests.lab.stock import encoded as stock_encoded
from tests.lab.stock import packed

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PUBLISHED = {"dev": FLUX_DEV, "schnell": FLUX_SCHNELL, "fill": FLUX_FILL}


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    """All variants."""
    return {
        name: tiny_flux(tmp_path_factory.mktemp(name), published) for name, published in PUBLISHED.items()
    }


@pytest.fixture(scope="module")
def engine(tinies: dict[str, Tiny]) -> DiffusionEngine:
    # In the order of the real ones: what is narrower stands first.
    return DiffusionEngine("cpu", families=[tinies[name].family for name in ("dev", "fill", "schnell")])


@pytest.fixture(scope="module")
def shared_files(tinies: dict[str, Tiny]) -> tuple[LocalFile, ...]:
    """Text encoders and VAE, which are the same for all variants."""
    return tuple(tinies["dev"].file(part) for part in ("text_encoder", "text_encoder_2", "vae"))


def denoiser(tiny: Tiny) -> LocalFile:
    return tiny.file("transformer")


DEV = {"guidance_scale": 3.5, "true_cfg_scale": GUIDANCE, "negative_prompt": "", "shift": math.exp(1.15)}


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_picture_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...], name: str
) -> None:
    """From the published files a picture is, pixel for pixel, what the library's pipeline makes."""
    tiny = tinies[name]
    tokens = {"max_sequence_length": tiny.family.prompt_tokens}
    picture = make(engine, [denoiser(tiny), *shared_files])
    shift = {"shift": math.exp(tiny.family.flow_shift)}
    assert same(picture, stock(pipeline(tiny, FluxPipeline), **DEV | shift, **tokens))
    assert picture.meta["family"] == f"tiny-flux1-{name}"


def test_picture_without_true_guidance_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """At cfgScale 1, which is how FLUX.1 is meant, only the distilled guidance is used."""
    expected = stock(pipeline(tinies["dev"], FluxPipeline), guidance_scale=3.5, shift=DEV["shift"])
    assert same(make(engine, [denoiser(tinies["dev"]), *shared_files], cfg_scale=1.0), expected)


def test_picture_from_picture_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """Image-to-image is the library's, pixel for pixel."""
    start = scene(WIDTH, HEIGHT)
    expected = stock(pipeline(tinies["dev"], FluxPipeline), **DEV, picture=start, denoise=0.7)
    picture = make(
        engine, [denoiser(tinies["dev"]), *shared_files], inputs=Inputs(encoded(start)), denoise=0.7
    )
    assert same(picture, expected)


def filling(tiny: Tiny, start: Image.Image, mask: Image.Image) -> Any:
    """Fill's pipeline, given the masked picture's latents and the mask's pixels by cell."""
    pipe = pipeline(tiny, FluxFillPipeline)
    masked = stock_encoded(tiny.parts["vae"], start, SEED, draw=1, mask=mask)
    high, wide = masked.shape[-2:]
    by_cell = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255).view(1, high, 8, wide, 8)
    by_cell = by_cell.permute(0, 2, 4, 1, 3).reshape(1, 64, high, wide)
    both = packed(by_cell), packed(masked)
    pipe.prepare_mask_latents = lambda *_: both
    return pipe


@pytest.mark.parametrize("name", ["dev", "fill"])
def test_picture_within_mask_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...], name: str
) -> None:
    """Inpainting, by dev and by Fill, is the library's where the mask is white, and untouched elsewhere."""
    start, mask = scene(WIDTH, HEIGHT), right_half()
    asked = {"picture": start, "mask": mask, "denoise": 0.7}
    if name == "fill":
        asked |= {"image": start, "mask_image": mask, "strength": 1.0}
        more = {"guidance_scale": 30.0, "shift": DEV["shift"], "is_grown": True}
        expected = stock(filling(tinies[name], start, mask), **asked, **more)
    else:
        expected = stock(pipeline(tinies[name], FluxPipeline), **DEV, **asked)
    picture = make(
        engine,
        [denoiser(tinies[name]), *shared_files],
        inputs=Inputs(encoded(start), encoded(mask)),
        denoise=0.7,
        cfg_scale=1.0 if name == "fill" else None,
    )
    assert same(picture, Image.composite(expected, start, mask))


def test_whole_checkpoint_makes_the_librarys_picture(
    tinies: dict[str, Tiny], engine: DiffusionEngine
) -> None:
    """One file of role model, as Comfy-Org packs it (flux1-dev-fp8.safetensors), makes the same picture."""
    tiny = tinies["dev"]
    prefixes = {
        "model.diffusion_model.": "transformer",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.t5xxl.transformer.": "text_encoder_2",
        "vae.": "vae",
    }
    packed = {prefix: tiny.published[part].tensors for prefix, part in prefixes.items()}
    tensors = {prefix + name: tensor for prefix, part in packed.items() for name, tensor in part.items()}
    file = safetensors(tiny.folder / "whole.safetensors", "model", tensors)
    assert same(make(engine, [file]), stock(pipeline(tiny, FluxPipeline), **DEV))


def gguf_files(tiny: Tiny, kind: Kind | None) -> tuple[LocalFile, LocalFile]:
    """The denoiser as city96/FLUX.1-dev-gguf has it (Black Forest Labs' names), and T5's encoder as
    city96/t5-v1_1-xxl-encoder-gguf (llama.cpp's, architecture ``t5encoder``).
    """
    denoiser, t5 = tiny.published["transformer"], tiny.published["text_encoder_2"]
    return (
        write_gguf(tiny.folder / f"dit-{kind}.gguf", denoiser.role, denoiser.tensors, "flux", kind),
        write_gguf(tiny.folder / f"t5-{kind}.gguf", t5.role, t5.in_gguf or {}, "t5encoder", kind),
    )


def test_unquantised_gguf_makes_the_librarys_picture(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """GGUF files in single precision make the library's picture pixel for pixel."""
    clip, _, vae = shared_files
    files = [*gguf_files(tinies["dev"], None), clip, vae]
    assert same(make(engine, files), stock(pipeline(tinies["dev"], FluxPipeline), **DEV))


@pytest.mark.parametrize(("kind", "bound"), [(Q8, 3.0), (Q4, 20.0)])
def test_quantised_gguf_is_near_the_librarys_picture(
    tinies: dict[str, Tiny],
    engine: DiffusionEngine,
    shared_files: tuple[LocalFile, ...],
    kind: Kind,
    bound: float,
) -> None:
    """Quantised files make nearly the library's picture: off by less than ``bound`` in 255; and hardly
    another one than the numbers that they were made to.
    """
    clip, _, vae = shared_files
    files = gguf_files(tinies["dev"], kind)
    picture = make(engine, [*files, clip, vae])
    assert 0 < difference(picture, stock(pipeline(tinies["dev"], FluxPipeline), **DEV)) < bound
    assert difference(picture, make(engine, [*map(dequantised, files), clip, vae])) <= DECODING


def eight_bit_denoiser(tiny: Tiny) -> LocalFile:
    """The denoiser as ``flux1-dev-fp8.safetensors`` and ``flux_dev_fp8_scaled_diffusion_model``."""
    return tiny.file("transformer", "8-bit")


def test_eight_bit_floats_make_the_picture_of_their_numbers(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """A denoiser in scaled 8-bit floats, whose fused matrices are taken apart, and T5 as
    ``t5xxl_fp8_e4m3fn_scaled`` make the picture of the very numbers that they have, pixel for pixel.
    """
    tiny = tinies["dev"]
    clip, _, vae = shared_files
    t5 = tiny.file("text_encoder_2", "8-bit")
    files = [eight_bit_denoiser(tiny), t5]
    assert same(make(engine, [*files, clip, vae]), make(engine, [*map(widened, files), clip, vae]))


def test_shards_of_a_text_encoder_are_one(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """A text encoder that is published in several files, beside another in one, makes the same picture."""
    tiny = tinies["dev"]
    clip, t5, vae = shared_files
    shards = in_shards(tiny.folder / "t5", "text-encoder", tiny.published["text_encoder_2"].tensors, 3)
    picture = make(engine, [denoiser(tiny), shards[1], clip, *shards[::2], vae])
    assert same(picture, make(engine, [denoiser(tiny), clip, t5, vae]))


def test_fused_tensors_are_taken_apart_as_the_library_does() -> None:
    """The published names become diffusers' as the library's own converter turns them, value for value.

    The converter knows one width only, 3072: of each matrix one column is enough.
    """
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    published = one_column(flux1(double=2, single=2))
    assert_same_tensors(
        from_black_forest(published), convert_flux_transformer_checkpoint_to_diffusers(dict(published))
    )


def test_inverse_of_the_published_layout_is_exact(tinies: dict[str, Tiny]) -> None:
    """The layout that these tests write is the one that is read: back and forth, nothing changes."""
    tensors = state(tinies["dev"].parts["transformer"])
    assert_same_tensors(from_black_forest(black_forest(tensors)), tensors)


def assert_same_tensors(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("masked", [False, True])
def test_edit_is_the_librarys_kontext(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...], masked: bool
) -> None:
    """An edit by reference (refImageUrl) is what the library's Kontext pipeline makes, of the size asked for;
    within a mask, what it leaves black stays the reference.
    """
    reference = scene(80, 56)
    pipe = pipeline(tinies["dev"], FluxKontextPipeline)
    # In as many pixels as the picture has, sides rounded to 16.
    shown = reference.resize((64, 48), Image.Resampling.LANCZOS)
    seen = stock_encoded(tinies["dev"].parts["vae"], shown, SEED)
    expected = stock(pipe, **DEV, image=seen, max_area=WIDTH * HEIGHT)
    if masked:
        kept = reference.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        expected = Image.composite(expected, kept, right_half())
    inputs = Inputs(mask=encoded(right_half()) if masked else None, ref_image=encoded(reference))
    assert same(make(engine, [denoiser(tinies["dev"]), *shared_files], inputs=inputs), expected)


def test_edit_by_schnell_is_refused(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """A model that was not made for edits refuses them by name, whatever its weights could be fed."""
    inputs = Inputs(ref_image=encoded(scene()))
    with pytest.raises(JobError, match=r"tiny-flux1-schnell works only with .*, not with refImageUrl"):
        make(engine, [denoiser(tinies["schnell"]), *shared_files], inputs=inputs)


def test_fill_without_mask_is_refused(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """Fill paints within masks; anything else is refused."""
    files = [denoiser(tinies["fill"]), *shared_files]
    with pytest.raises(
        JobError, match="tiny-flux1-fill works only with initImageUrl with maskUrl, not with a prompt alone"
    ):
        make(engine, files, cfg_scale=1.0)


@pytest.mark.parametrize("mode", [Mode.COMPONENT, Mode.LAYERS])
def test_offloaded_picture_is_the_same(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...], mode: Mode
) -> None:
    """On a card too small for the model, quantised as it is, a picture is the same."""
    clip, t5, vae = shared_files
    gguf_denoiser, gguf_t5 = gguf_files(tinies["dev"], Q8)
    for files in ([gguf_denoiser, clip, gguf_t5, vae], [eight_bit_denoiser(tinies["dev"]), clip, t5, vae]):
        _offloaded_is_the_same(tinies["dev"], engine, files, mode)


def _offloaded_is_the_same(tiny: Tiny, engine: DiffusionEngine, files: list[LocalFile], mode: Mode) -> None:
    assert same(make(engine, files), offloaded(tiny.family, files, mode))


def test_flow_shift_is_stable_diffusion_cpps(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """cliDefaults.flowShift is the logarithm of the shift, as stable-diffusion.cpp's --flow-shift for FLUX.1
    (its flux_time_shift), and holds for every size of picture.
    """
    tiny = tinies["dev"]
    defaults = DEFAULTS.model_copy(update={"flow_shift": 0.5})
    picture = make(engine, [denoiser(tiny), *shared_files], defaults=defaults)
    assert same(picture, stock(pipeline(tiny, FluxPipeline), **DEV | {"shift": math.exp(0.5)}))
    assert picture.meta["flowShift"] == 0.5


def test_flow_shift_that_is_no_logarithm_is_refused(
    tinies: dict[str, Tiny], engine: DiffusionEngine, shared_files: tuple[LocalFile, ...]
) -> None:
    """A flowShift that would leave every step at full noise, or be too large a number, is refused before
    anything is loaded, and the message says what is meant by it here.
    """
    for shift in (6.0, 99.0):
        defaults = DEFAULTS.model_copy(update={"flow_shift": shift})
        with pytest.raises(JobError, match=rf"flowShift {shift:g} .* logarithm, .* 4\.6 at most") as caught:
            make(engine, [denoiser(tinies["dev"]), *shared_files], defaults=defaults)
        assert caught.value.is_jobs_fault
