"""Stable Diffusion 3 and 3.5: tiny random models in the published layouts, beside the library's pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.sd3 import SD35_LARGE, Folders, StableDiffusion3, sd3
from studio_worker.engine.families.t5 import T5_TOKENIZER
from studio_worker.errors import JobError
from studio_worker.models import LocalFile
from tests.engine_lab import encoded, scene
from tests.flow_models import (
    CLIP,
    GUIDANCE,
    HEIGHT,
    T5,
    VAE,
    WIDTH,
    Tensors,
    compvis_vae,
    config,
    difference,
    drawn,
    make,
    right_half,
    safetensors,
    same,
    state,
    stock,
)
from tests.quantising import DECODING, Q8, Kind, dequantised, write_gguf

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

TRANSFORMER: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_projection_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 8,
    "dual_attention_layers": [],
    "qk_norm": None,
}
VARIANTS = {
    "medium": TRANSFORMER,
    "large-3.5": TRANSFORMER | {"qk_norm": "rms_norm"},
    "medium-3.5": TRANSFORMER | {"qk_norm": "rms_norm", "dual_attention_layers": [0]},
}
CLIP_G = CLIP | {"hidden_act": "gelu"}
WIDE_T5 = T5 | {"d_model": 64}
VAE_16 = VAE | {"latent_channels": 16}
"""diffusers' inpainting pipeline takes no other number."""


@dataclass(frozen=True)
class Tiny:
    """The library's own modules of one variant, and a family of their sizes."""

    parts: dict[str, Any]
    family: StableDiffusion3
    folder: Path

    def pipeline(self, cls: Any = StableDiffusion3Pipeline, **other: Any) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(SD35_LARGE.scheduler))
        return cls(**self.parts | other, scheduler=scheduler)


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    folder = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(0)
    shipped = Folders(folder)
    shared = {
        "text_encoder": drawn(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)), 1),
        "text_encoder_2": drawn(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)), 2),
        "text_encoder_3": drawn(T5EncoderModel(T5Config(**WIDE_T5)), 3),
        "vae": drawn(AutoencoderKL.from_config(VAE_16), 4),
        "tokenizer": CLIPTokenizer.from_pretrained(str(shipped.tokenizer)),
        "tokenizer_2": CLIPTokenizer.from_pretrained(str(shipped.tokenizer), pad_token="!"),
        "tokenizer_3": T5Tokenizer.from_pretrained(str(T5_TOKENIZER.folder)),
    }
    made = {}
    for name, numbers in VARIANTS.items():
        folders = Folders(
            transformer=config(folder / name, numbers),
            text_encoder=config(folder / "text_encoder", CLIP),
            text_encoder_2=config(folder / "text_encoder_2", CLIP_G),
            text_encoder_3=config(folder / "text_encoder_3", WIDE_T5),
            vae=config(folder / "vae", VAE_16),
        )
        transformer = drawn(SD3Transformer2DModel.from_config(numbers), 5)
        # The published table of places is half precision's, not the one that the class computes.
        transformer.pos_embed.pos_embed = (transformer.pos_embed.pos_embed * 0.9).half().float()
        made[name] = Tiny({**shared, "transformer": transformer}, sd3(f"tiny-{name}", folders), folder)
    return made


@pytest.fixture(scope="module")
def engine(tinies: dict[str, Tiny]) -> DiffusionEngine:
    return DiffusionEngine("cpu", families=[tiny.family for tiny in tinies.values()])


@pytest.fixture(scope="module")
def text_files(tinies: dict[str, Tiny]) -> tuple[LocalFile, ...]:
    """``clip_l``, ``clip_g`` and ``t5xxl_fp16.safetensors`` as Stability AI publishes them: transformers'
    names.
    """
    tiny = tinies["medium"]
    return tuple(
        safetensors(tiny.folder / f"{name}.safetensors", "text-encoder", state(tiny.parts[part]))
        for name, part in (
            ("clip_l", "text_encoder"),
            ("clip_g", "text_encoder_2"),
            ("t5xxl", "text_encoder_3"),
        )
    )


def stability(tensors: Tensors) -> Tensors:
    """A transformer's tensors (diffusers' names) as Stability AI's files have them.

    Source: https://github.com/Stability-AI/sd3.5 (mmditx.py).
    """
    ends = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    block = {
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    fused = {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    }
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    named: Tensors = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name in ends:
            named[ends[name]] = tensor
        elif module in ends:
            named[f"{ends[module]}.{leaf}"] = _shift_first(tensor) if module == "norm_out.linear" else tensor
        else:
            _, number, inner = module.split(".", 2)
            if inner in block:
                # The last block's context has no gates: its modulation is AdaLayerNormContinuous.
                swapped = inner == "norm1_context.linear" and int(number) == last
                named[f"joint_blocks.{number}.{block[inner]}.{leaf}"] = (
                    _shift_first(tensor) if swapped else tensor
                )
            for target, parts in fused.items():
                if inner == parts[0]:
                    rows = [tensors[f"transformer_blocks.{number}.{part}.{leaf}"] for part in parts]
                    named[f"joint_blocks.{number}.{target}.{leaf}"] = torch.cat(rows)
    return named


def _shift_first(tensor: torch.Tensor) -> torch.Tensor:
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def checkpoint(tiny: Tiny) -> LocalFile:
    """Denoiser and VAE in one file of role model, as ``sd3.5_large.safetensors``; text encoders are beside
    it.
    """
    packed = {
        "model.diffusion_model.": stability(state(tiny.parts["transformer"])),
        "first_stage_model.": compvis_vae(state(tiny.parts["vae"]), 4),
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
    assert same(picture, stock(tinies[name].pipeline(), **GUIDED))
    assert picture.meta["family"] == f"tiny-{name}"


def test_picture_without_t5_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, text_files: tuple[LocalFile, ...]
) -> None:
    """Without T5, which a source may leave out, a picture is the library's without it."""
    tiny = tinies["large-3.5"]
    expected = stock(tiny.pipeline(text_encoder_3=None, tokenizer_3=None), **GUIDED)
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
    assert same(picture, stock(tiny.pipeline(text_encoder=whole), **GUIDED))


def test_picture_from_picture_is_the_librarys(
    tinies: dict[str, Tiny], engine: DiffusionEngine, text_files: tuple[LocalFile, ...]
) -> None:
    """Image-to-image, and inpainting where the mask is white, are the library's, pixel for pixel."""
    tiny = tinies["medium-3.5"]
    start, mask = scene(WIDTH, HEIGHT), right_half()
    files = [checkpoint(tiny), *text_files]
    expected = stock(tiny.pipeline(StableDiffusion3Img2ImgPipeline), **GUIDED, image=start, strength=0.7)
    assert same(make(engine, files, inputs=Inputs(encoded(start)), denoise=0.7), expected)
    # diffusers' inpainting pipeline (0.42) forgets to shift the latents back, as all its others do.
    vae = tiny.parts["vae"]
    decode, shift = vae.decode, vae.config.shift_factor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "decode", lambda latents, **options: decode(latents + shift, **options))
        pipeline = tiny.pipeline(StableDiffusion3InpaintPipeline)
        painted = stock(pipeline, **GUIDED, image=start, mask_image=mask, strength=0.7)
    picture = make(engine, files, inputs=Inputs(encoded(start), encoded(mask)), denoise=0.7)
    assert same(picture, Image.composite(painted, start, mask))


@pytest.mark.parametrize(("kind", "bound"), [(None, 0.0), (Q8, 3.0)])
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
    tensors = stability(state(tiny.parts["transformer"]))
    denoiser = write_gguf(tiny.folder / f"dit-{kind}.gguf", "diffusion-model", tensors, "sd3", kind)
    vae = safetensors(tiny.folder / "vae.safetensors", "vae", compvis_vae(state(tiny.parts["vae"]), 4))
    picture = make(engine, [denoiser, vae, *text_files])
    assert difference(picture, stock(tiny.pipeline(), **GUIDED)) <= bound
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
    tensors = stability(state(tiny.parts["transformer"]))
    tensors["joint_blocks.x.x_block.attn.qkv.weight"] = torch.zeros(3, 4)
    strange = safetensors(tiny.folder / "strange.safetensors", "diffusion-model", tensors)
    vae = safetensors(tiny.folder / "vae.safetensors", "vae", compvis_vae(state(tiny.parts["vae"]), 4))
    with pytest.raises(JobError, match=r"holds no whole .*: ValueError") as caught:
        make(engine, [strange, vae, *text_files])
    assert caught.value.is_final_here
