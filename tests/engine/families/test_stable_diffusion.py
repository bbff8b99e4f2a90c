"""Stable Diffusion 2.x, XL and inpainting models: tiny random ones in the published layouts, against the
library's own pipelines; and the full sizes against published names and shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from PIL import Image

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import FAMILIES, identify
from studio_worker.engine.families.sdxl import SDXL
from studio_worker.engine.families.stable_diffusion import (
    SD2,
    SD2_INPAINT,
    StableDiffusion,
)
from studio_worker.engine.loading import empty_model, load_scheduler, load_tokenizer
from studio_worker.errors import JobError
from studio_worker.gpu_check.tiny import compvis
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.gpu_check.tiny.quantised import without_outer_ones, write_gguf
from studio_worker.gpu_check.tiny.stable_diffusion import UNET, VAE, sd2_checkpoint, tiny_sd, tiny_sdxl
from studio_worker.gpu_check.tiny.weights import prefixed, renamed, safetensors
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import decoded, encoded, request, scene, write_header
from tests.lab.quantising import DECODING, Q8, dequantised
from tests.lab.stock import alike, run
from tests.lab.stock import encoded as stock_encoded

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIZE = CliDefaults(width=64, height=64, steps=3, cfg_scale=4.0, sampling_method="euler")
PROMPT = "a red potion!"


def picture(tiny: Tiny, *files: LocalFile, **task: Any) -> np.ndarray:
    engine = DiffusionEngine("cpu", families=(tiny.family,))
    asked = request(**{"files": files, "defaults": SIZE, "prompt": PROMPT} | task)
    return np.asarray(decoded(engine.generate(asked, lambda done, total: None, Cancel()).data), dtype=int)


def expected_of(tiny: Tiny, cls: str, prediction_type: str = "epsilon", **arguments: Any) -> np.ndarray:
    """The picture of diffusers' own pipeline over the same components."""
    tokenizers = {name: load_tokenizer(each) for name, each in tiny.family.tokenizers.items()}
    shipped = load_scheduler(tiny.family)
    scheduler = type(shipped).from_config(shipped.config, prediction_type=prediction_type)
    fixed = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    is_xl = "text_encoder_2" in tiny.parts
    pipeline = getattr(diffusers, cls)(
        **tiny.parts,
        **tokenizers,
        scheduler=scheduler,
        **({"add_watermarker": False} if is_xl else fixed),
    )
    asked = {"prompt": PROMPT, "guidance_scale": 4.0} | arguments
    if is_xl and "negative_prompt" not in asked:
        asked |= unconditional(pipeline, asked.pop("prompt"))
    return np.asarray(run(pipeline, width=64, height=64, steps=3, seed=7, **asked), dtype=int)


def unconditional(pipeline: Any, prompt: str) -> dict[str, torch.Tensor]:
    """What Stable Diffusion XL reads without a negative prompt: nothing at all, but for what sums it up."""
    found = pipeline.encode_prompt(prompt, negative_prompt="", device="cpu")
    positive, nothing, pooled, sum_of_nothing = found
    return {
        "prompt_embeds": positive,
        "negative_prompt_embeds": torch.zeros_like(nothing),
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": sum_of_nothing,
    }


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_sd(tmp_path_factory.mktemp("sd2"), SD2)


@pytest.fixture(scope="module")
def sd_inpaint(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_sd(tmp_path_factory.mktemp("inpaint"), SD2_INPAINT, channels=9)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"), SDXL)


def mask() -> Image.Image:
    area = Image.new("L", (64, 64), 0)
    area.paste(255, (16, 16, 48, 48))
    return area


# --- Stable Diffusion 2.x ---


@pytest.mark.parametrize(("spread", "prediction_type"), [(0.05, "epsilon"), (0.2, "v_prediction")])
def test_sd2_picture_is_the_stock_pipelines(sd2: Tiny, spread: float, prediction_type: str) -> None:
    """Models that predict noise and models that predict v are told apart, and each renders as diffusers
    does.
    """
    last = [
        n for n, _ in sd2.parts["unet"].named_parameters() if n.endswith("transformer_blocks.0.norm1.bias")
    ]
    bias = sd2.parts["unet"].get_parameter([name for name in last if name.startswith("up_blocks.")][-1])
    bias.data = bias.data / bias.data.std(unbiased=False) * spread
    file = safetensors(sd2.folder / f"{prediction_type}.safetensors", "model", sd2_checkpoint(sd2.parts))
    expected = expected_of(sd2, "StableDiffusionPipeline", prediction_type, negative_prompt="")
    assert alike(picture(sd2, file), expected)
    assert expected.std() > 10


def test_inpainting_model_sees_the_mask(sd_inpaint: Tiny) -> None:
    """A UNet of nine channels inpaints, pixel for pixel inside the mask as diffusers does."""
    file = sd_inpaint.file("model")
    inputs = Inputs(encoded(scene()), encoded(mask()))
    found = picture(sd_inpaint, file, inputs=inputs, denoise=1.0, cfg_scale=1.0)
    expected = expected_of(
        sd_inpaint,
        "StableDiffusionInpaintPipeline",
        guidance_scale=1.0,
        picture=scene(),
        mask=mask(),
        is_grown=True,
        image=scene(),
        mask_image=mask(),
        masked_image_latents=stock_encoded(sd_inpaint.parts["vae"], scene(), seed=7, draw=1, mask=mask()),
        strength=1.0,
    )
    inside = np.asarray(mask()) > 0
    assert alike(found[inside], expected[inside])
    assert (found[~inside] == np.asarray(scene())[~inside]).all()


def test_negative_prompt_of_an_inpainting_model_sees_nothing_of_the_picture(sd_inpaint: Tiny) -> None:
    """With guidance, what is told apart from the prompt sees zeros where the masked picture stands, as in
    stable-diffusion.cpp; diffusers shows it to both.
    """
    file = sd_inpaint.file("model")
    inputs = Inputs(encoded(scene()), encoded(mask()))
    found = picture(sd_inpaint, file, inputs=inputs, denoise=1.0, cfg_scale=4.0)

    def hide(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        latents = inputs[0].clone()
        latents[0, 5:] = 0  # of the two the first one is without the prompt; noise, mask, masked picture
        return (latents, *inputs[1:])

    arguments = {
        "picture": scene(),
        "mask": mask(),
        "is_grown": True,
        "image": scene(),
        "mask_image": mask(),
        "masked_image_latents": stock_encoded(sd_inpaint.parts["vae"], scene(), seed=7, draw=1, mask=mask()),
        "strength": 1.0,
    }
    hook = sd_inpaint.parts["unet"].register_forward_pre_hook(hide)
    try:
        expected = expected_of(sd_inpaint, "StableDiffusionInpaintPipeline", **arguments)
    finally:
        hook.remove()
    inside = np.asarray(mask()) > 0
    assert alike(found[inside], expected[inside])
    shown = expected_of(sd_inpaint, "StableDiffusionInpaintPipeline", **arguments)
    assert not alike(found[inside], shown[inside])


@pytest.mark.parametrize("inputs", [Inputs(), Inputs(encoded(scene()))])
def test_inpainting_model_without_mask_is_refused_before_it_is_loaded(
    sd_inpaint: Tiny, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inpainting model is not asked for anything else, and says so without loading."""
    file = sd_inpaint.file("model")
    monkeypatch.setattr("studio_worker.engine.rendering.loader.load_part", pytest.fail)
    with pytest.raises(JobError, match=r"tiny-sd2-inpaint .*only .*maskUrl") as caught:
        picture(sd_inpaint, file, inputs=inputs)
    assert caught.value.is_final_here


# --- Stable Diffusion XL ---


def test_xl_picture_is_the_stock_pipelines(xl: Tiny) -> None:
    """From a checkpoint in one file, pixel for pixel what diffusers makes, with a negative prompt and
    without.
    """
    file = xl.file("model")
    expected = expected_of(xl, "StableDiffusionXLPipeline")
    assert alike(picture(xl, file), expected)
    assert expected.std() > 10
    negative = expected_of(xl, "StableDiffusionXLPipeline", negative_prompt="blue")
    assert alike(picture(xl, file, negative_prompt="blue"), negative)
    assert (negative != expected).any()


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_xl_in_parts(xl: Tiny, layout: str) -> None:
    """From a UNet, a vae and two text encoders of one role, told apart by their sizes, the same picture."""
    unet, vae = xl.parts["unet"].state_dict(), xl.parts["vae"].state_dict()
    if layout == "original":
        unet, vae = compvis.unet(unet), compvis.vae(vae, 2)
    clip_l = {f"text_model.{n}": t for n, t in xl.parts["text_encoder"].state_dict().items()}
    clip_g = xl.parts["text_encoder_2"].state_dict()
    files = (
        safetensors(xl.folder / "clip_g.safetensors", "text-encoder", clip_g),
        safetensors(xl.folder / "clip_l.safetensors", "text-encoder", clip_l),
        safetensors(xl.folder / f"{layout}-vae.safetensors", "vae", vae),
        safetensors(xl.folder / f"{layout}-unet.safetensors", "diffusion-model", unet),
    )
    assert alike(picture(xl, *files), expected_of(xl, "StableDiffusionXLPipeline"))


def test_vae_of_an_old_diffusers(xl: Tiny) -> None:
    """A VAE under the attention names that diffusers had before 0.14 works, as sd-vae-ft-mse has them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        return name

    state = renamed(xl.parts["vae"].state_dict(), rename)
    assert "decoder.mid_block.attentions.0.query.weight" in state
    vae = safetensors(xl.folder / "old-vae.safetensors", "vae", state)
    file = xl.file("model")
    assert alike(picture(xl, file, vae), expected_of(xl, "StableDiffusionXLPipeline"))


def test_xl_picture_from_picture_and_inpainting(xl: Tiny) -> None:
    """Image-to-image and inpainting are pixel for pixel what diffusers makes."""
    file = xl.file("model")
    found = picture(xl, file, inputs=Inputs(encoded(scene())), denoise=0.7)
    expected = expected_of(xl, "StableDiffusionXLPipeline", picture=scene(), denoise=0.7)
    assert alike(found, expected)
    found = picture(xl, file, inputs=Inputs(encoded(scene()), encoded(mask())), denoise=1.0)
    expected = expected_of(xl, "StableDiffusionXLPipeline", picture=scene(), mask=mask())
    inside = np.asarray(mask()) > 0
    assert alike(found[inside], expected[inside])


@pytest.mark.parametrize(("markers", "name"), [(("v_pred",), "sdxl-v"), (("v_pred", "ztsnr"), "sdxl-v-zsnr")])
def test_xl_that_predicts_v_says_so(tmp_path: Path, markers: tuple[str, ...], name: str) -> None:
    """Models that predict v are told by the marker tensors that their makers put in."""
    shapes = {n: tuple(t.shape) for n, t in published_xl().items()} | dict.fromkeys(markers, (0,))
    path = write_header(tmp_path / "x.safetensors", shapes)
    assert identify([LocalFile("model", path, "x")]).family.name == name


def test_playground_is_refused_by_name(xl: Tiny) -> None:
    """Playground 2.5, which is shaped like Stable Diffusion XL with another noise schedule, is not taken for
    one.
    """
    state = xl.published["model"].tensors | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
    file = safetensors(xl.folder / "playground.safetensors", "model", state)
    with pytest.raises(JobError, match=r"is Playground 2\.5, which this worker does not serve") as caught:
        picture(xl, file)
    assert caught.value.is_final_here


def test_xl_whole_checkpoint_as_gguf(xl: Tiny) -> None:
    """A checkpoint in one GGUF file, as stable-diffusion.cpp converts it, makes nearly the same picture, and
    hardly another one than the numbers that it was made to.
    """
    state = xl.published["model"].tensors
    file = write_gguf(xl.folder / "whole.gguf", "model", without_outer_ones(state), "sdxl", Q8)
    found = picture(xl, file)
    assert np.abs(found - expected_of(xl, "StableDiffusionXLPipeline")).mean() < 4
    assert np.abs(found - picture(xl, dequantised(file))).mean() <= DECODING


# --- the full sizes ---

PUBLISHED_XL = {
    UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    UNET + "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
    UNET + "label_emb.0.0.weight": (1280, 2816),
    UNET + "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
    UNET + "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    UNET + "out.2.weight": (4, 320, 3, 3),
    VAE + "decoder.conv_in.weight": (512, 4, 3, 3),
    VAE + "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "conditioner.embedders.1.model.positional_embedding": (77, 1280),
    "conditioner.embedders.1.model.text_projection": (1280, 1280),
    "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
    "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
}
"""Some tensors of ``sd_xl_base_1.0.safetensors``: what Stability's generative-models
(``configs/inference/sd_xl_base.yaml``) builds, and the keys by which diffusers and ComfyUI know it.
"""


def published_xl() -> dict[str, torch.Tensor]:
    """All tensors of the published checkpoint, without memory."""
    with init_empty_weights():
        unet, first, second, vae = (empty_model(part).state_dict() for part in SDXL.parts.values())
    tiny = {f"text_model.{n}": t for n, t in first.items()}
    with torch.device("meta"):
        return {
            **prefixed(compvis.unet(unet), UNET),
            **prefixed(compvis.vae(vae, 4), VAE),
            **prefixed(tiny, "conditioner.embedders.0.transformer."),
            **prefixed(compvis.open_clip(second), "conditioner.embedders.1.model."),
        }


def test_full_size_xl_is_the_published_one(tmp_path: Path) -> None:
    """The carried configurations build the published SDXL: its names, its shapes, its parameters."""
    with init_empty_weights():
        models = {name: empty_model(part) for name, part in SDXL.parts.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts == {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    }
    published = published_xl()
    assert {name: tuple(published[name].shape) for name in PUBLISHED_XL} == PUBLISHED_XL
    for name, prefix in (
        ("unet", UNET),
        ("vae", VAE),
        ("text_encoder", "conditioner.embedders.0.transformer."),
        ("text_encoder_2", "conditioner.embedders.1.model."),
    ):
        part = SDXL.parts[name]
        own = {n.removeprefix(prefix): t for n, t in published.items() if n.startswith(prefix)}
        layout = next(each for each in part.layouts if each.fits({n: tuple(t.shape) for n, t in own.items()}))
        renamed = layout.rename(own)
        wanted = dict(models[name].named_parameters())
        assert {n: renamed[n].shape for n in wanted} == {n: p.shape for n, p in wanted.items()}
    path = write_header(tmp_path / "xl.safetensors", {n: tuple(t.shape) for n, t in published.items()})
    assert identify([LocalFile("model", path, "xl")]).family.name == "sdxl"


def test_full_size_sd2_is_the_published_one() -> None:
    """The carried configurations build the published Stable Diffusion 2.1: its parameters."""
    with init_empty_weights():
        counts = [sum(p.numel() for p in empty_model(part).parameters()) for part in SD2.parts.values()]
    assert counts == [865_910_724, 340_387_840, 83_653_863]


@pytest.mark.parametrize(
    ("kind", "width"), [("sd1-inpaint", 768), ("sd2-inpaint", 1024), ("sdxl-inpaint", 2048)]
)
def test_full_size_inpainting_model_is_known(kind: str, width: int) -> None:
    """The inpainting models' UNets are those of their base models, but for nine channels in."""
    family = next(each for each in FAMILIES if each.name == kind)
    with init_empty_weights():
        unet = empty_model(family.parts["unet"])
    assert (unet.config.in_channels, unet.config.cross_attention_dim) == (9, width)
    assert isinstance(family, StableDiffusion) or kind == "sdxl-inpaint"
