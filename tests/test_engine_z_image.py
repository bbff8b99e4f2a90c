"""Z-Image: tiny random models in every published file layout, against the library's own pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from transformers import Qwen3Config, Qwen3Model

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.qwen import QWEN_TOKENIZER, from_llama_cpp
from studio_worker.engine.families.z_image import Z_IMAGE, z_image
from studio_worker.engine.loading import empty_model, load_part, load_tokenizer
from studio_worker.engine.memory import weight_bytes
from studio_worker.engine.parameters import resolve
from studio_worker.engine.rendering import LoadedModel, Starting
from studio_worker.engine.sections import read_sections
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests import tiny_models
from tests.engine_lab import decoded, encoded, refuse_network, request, scene, write_header

torch.set_num_threads(1)

PREFIX = "model.diffusion_model."
SIZE = CliDefaults(width=64, height=64, steps=3, cfg_scale=1.0)
Q8, Q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_network(monkeypatch)


@dataclass(frozen=True)
class Tiny:
    """A tiny Z-Image: the library's pipeline over it, its family, and a folder for its files."""

    stock: Any
    family: Family
    folder: Path

    def picture(self, *files: LocalFile, **task: Any) -> np.ndarray:
        engine = DiffusionEngine("cpu", families=(self.family,))
        made = engine.generate(
            request(files=files, defaults=SIZE, **task), lambda done, total: None, Cancel()
        )
        return np.asarray(decoded(made.data), dtype=int)

    def expected(self, cls: Any = ZImagePipeline, guidance: float = 0.0, **arguments: Any) -> np.ndarray:
        pipeline = cls(**self.stock.components)
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            request().task.prompt,
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(7),
            **arguments,
        )
        return np.asarray(made.images[0], dtype=int)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("z-image")
    tokenizer = tiny_models.byte_tokenizer(
        folder / "tokenizer", {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    )
    transformer = ZImageTransformer2DModel(
        dim=96,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=[16, 16, 16],
    )
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=288,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=[16, 32, 32],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    for seed, part in enumerate(parts.values()):
        tiny_models.randomised(part, seed)
    configs = {name: tiny_models.write_config(folder / name, part) for name, part in parts.items()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock = ZImagePipeline(tokenizer=load_tokenizer(tokenizer), scheduler=scheduler, **parts)
    return Tiny(stock, z_image("tiny-z-image", **configs, tokenizer=tokenizer), folder)


def original_transformer(transformer: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer under the original names: fused qkv, as ComfyUI's and GGUF files have it.

    Source: diffusers' ``convert_z_image_transformer_checkpoint_to_diffusers``, whose inverse this is.
    """
    state = dict(transformer)
    for name in [name for name in state if name.endswith(".attention.to_q.weight")]:
        stem = name.removesuffix(".to_q.weight")
        state[f"{stem}.qkv.weight"] = torch.cat([state.pop(f"{stem}.to_{each}.weight") for each in "qkv"])
    return tiny_models.renamed(
        state,
        lambda name: (
            name.replace("all_final_layer.2-1.", "final_layer.")
            .replace("all_x_embedder.2-1.", "x_embedder.")
            .replace(".attention.to_out.0.", ".attention.out.")
            .replace(".attention.norm_k.", ".attention.k_norm.")
            .replace(".attention.norm_q.", ".attention.q_norm.")
        ),
    )


def transformer_file(tiny: Tiny, layout: str) -> LocalFile:
    state = (
        tiny.stock.transformer.state_dict()
        if layout == "diffusers"
        else original_transformer(tiny.stock.transformer.state_dict())
    )
    if layout == "original, prefixed":
        state = tiny_models.prefixed(state, PREFIX)
    return tiny_models.write_safetensors(
        tiny.folder / f"transformer-{layout}.safetensors", state, "diffusion-model"
    )


def text_encoder_file(tiny: Tiny) -> LocalFile:
    state = tiny_models.prefixed(tiny.stock.text_encoder.state_dict(), "model.")
    return tiny_models.write_safetensors(tiny.folder / "qwen.safetensors", state, "text-encoder")


def vae_file(tiny: Tiny, layout: str = "original") -> LocalFile:
    state = tiny.stock.vae.state_dict()
    if layout == "original":
        state = tiny_models.original_vae(state, levels=3)
    return tiny_models.write_safetensors(tiny.folder / f"ae-{layout}.safetensors", state, "vae")


@pytest.fixture(scope="module")
def files(tiny: Tiny) -> tuple[LocalFile, ...]:
    """The tiny model in safetensors: original transformer, transformers' Qwen3, ae.safetensors."""
    return transformer_file(tiny, "original"), text_encoder_file(tiny), vae_file(tiny)


@pytest.mark.parametrize("layout", ["diffusers", "original", "original, prefixed"])
def test_picture_is_the_stock_pipelines(tiny: Tiny, files: tuple[LocalFile, ...], layout: str) -> None:
    """From every published naming of the transformer, pixel for pixel what diffusers makes."""
    found = tiny.picture(transformer_file(tiny, layout), *files[1:])
    expected = tiny.expected()
    assert (found == expected).all()
    assert expected.std() > 10  # no flat picture


def test_vae_in_diffusers_layout(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """The VAE may come under diffusers' names too."""
    assert (tiny.picture(*files[:2], vae_file(tiny, "diffusers")) == tiny.expected()).all()


def test_whole_checkpoint_in_comfyuis_layout(tiny: Tiny) -> None:
    """All three components may come in one file of role model, as ComfyUI saves checkpoints.

    Source of the prefixes: ``comfy/supported_models.py``, ZImage and its ``process_*_state_dict_for_saving``.
    """
    text_encoder = tiny_models.prefixed(tiny.stock.text_encoder.state_dict(), "model.")
    state = {
        **tiny_models.prefixed(original_transformer(tiny.stock.transformer.state_dict()), PREFIX),
        **tiny_models.prefixed(text_encoder, "text_encoders.qwen3_4b.transformer."),
        **tiny_models.prefixed(tiny_models.original_vae(tiny.stock.vae.state_dict(), 3), "vae."),
    }
    file = tiny_models.write_safetensors(tiny.folder / "whole.safetensors", state, "model")
    assert (tiny.picture(file) == tiny.expected()).all()


def test_pickle_among_the_parts_is_refused_by_name(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """A part that is a pickle is refused by name, whatever its role, and never loaded."""
    for index, file in enumerate(files):
        path = tiny.folder / "pickle.bin"
        path.write_bytes(b"\x80\x04pickle")
        parts = [*files[:index], file._replace(path=path), *files[index + 1 :]]
        with pytest.raises(JobError, match=r"pickle\.bin is a Python pickle"):
            tiny.picture(*parts)


def test_guidance_is_the_usual_one(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """A cfgScale of 3 with a negative prompt is diffusers' guidance_scale of 2 in this family."""
    found = tiny.picture(*files, cfg_scale=3.0, negative_prompt="blue")
    assert (found == tiny.expected(guidance=2.0, negative_prompt="blue")).all()
    assert (found != tiny.expected()).any()


def test_picture_from_picture(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """Image-to-image is pixel for pixel what diffusers makes."""
    found = tiny.picture(*files, inputs=Inputs(encoded(scene())), denoise=0.6)
    assert (found == tiny.expected(ZImageImg2ImgPipeline, image=scene(), strength=0.6)).all()


def test_inpainting(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """Inside the mask the picture is diffusers' own; outside, every pixel is the initial picture's."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    found = tiny.picture(*files, inputs=Inputs(encoded(scene()), encoded(mask)), denoise=1.0)
    expected = tiny.expected(ZImageInpaintPipeline, image=scene(), mask_image=mask, strength=1.0)
    inside = np.asarray(mask) > 0
    assert (found[inside] == expected[inside]).all()
    assert (found[~inside] == np.asarray(scene())[~inside]).all()


def gguf_files(
    tiny: Tiny, quantisation: gguf.GGMLQuantizationType | None, name: str, *, ours: bool
) -> tuple[LocalFile, LocalFile]:
    """Transformer and text encoder as GGUF files.

    Args:
        ours: as stable-diffusion.cpp converts, else as city96's ComfyUI-GGUF does.
    """
    state = original_transformer(tiny.stock.transformer.state_dict())
    transformer = tiny_models.write_gguf(
        tiny.folder / f"{name}.gguf",
        tiny_models.prefixed(state, PREFIX) if ours else state,
        "diffusion-model",
        "lumina2",
        quantisation,
        drop_outer_ones=ours,
    )
    text_encoder = tiny_models.write_gguf(
        tiny.folder / f"{name}-qwen.gguf",
        tiny_models.llama_cpp(tiny.stock.text_encoder.state_dict()),
        "text-encoder",
        "qwen3",
        quantisation,
    )
    return transformer, text_encoder


@pytest.mark.parametrize(("quantisation", "bound"), [(None, 0.0), (Q8, 0.5), (Q4, 8.0)])
@pytest.mark.parametrize("converter", ["city96", "stable-diffusion.cpp"])
def test_gguf_makes_nearly_the_same_picture(
    tiny: Tiny,
    files: tuple[LocalFile, ...],
    quantisation: gguf.GGMLQuantizationType | None,
    bound: float,
    converter: str,
) -> None:
    """From GGUF files the picture differs by few grey levels on average, unquantised by none."""
    quantised = gguf_files(tiny, quantisation, f"{converter}-{quantisation}", ours="cpp" in converter)
    difference = np.abs(tiny.picture(*quantised, files[2]) - tiny.expected())
    assert difference.mean() <= bound


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_picture_in_brain_floats_is_nearly_the_same(
    tiny: Tiny, files: tuple[LocalFile, ...], form: str
) -> None:
    """With weights in bfloat16, as on a GPU, every kind of job gives nearly the same picture."""
    if form == "gguf":
        files = gguf_files(tiny, Q8, "brain", ours=True) + files[2:]
    blueprint = identify(files, (tiny.family,))
    asked = request(defaults=SIZE, denoise=0.75)
    mask = Image.new("L", (64, 64), 255)
    for starting in (Starting(), Starting(scene()), Starting(scene(), mask)):
        from_image = starting.picture is not None
        parameters = resolve(asked.task, asked.defaults, tiny.family.defaults, from_image=from_image)
        single, brain = (
            LoadedModel(
                tiny.family,
                {
                    name: load_part(part, blueprint.sections[name], torch.device("cpu"), dtype)
                    for name, part in tiny.family.parts.items()
                },
            ).render(parameters, starting, lambda done, total: None, Cancel())
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert np.abs(np.asarray(single.picture, int) - np.asarray(brain.picture, int)).mean() < 6


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_quantised_weights_stay_quantised(tiny: Tiny, part: str) -> None:
    """The matrices of a GGUF file take no more memory once loaded than in the file, and what a component will
    take is known before it is loaded.
    """
    quantised = gguf_files(tiny, Q8, "stays", ours=True)
    (section,) = read_sections(quantised[:1] if part == "transformer" else quantised[1:])
    loaded = load_part(tiny.family.parts[part], section, torch.device("cpu"), torch.float32)
    assert weight_bytes(loaded) == pytest.approx(section.size_bytes(4), rel=0.01)
    assert weight_bytes(loaded) < 0.6 * weight_bytes(getattr(tiny.stock, part))


def test_nan_is_no_black_picture(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """Weights that are not numbers fail the job instead of delivering black."""
    state = original_transformer(tiny.stock.transformer.state_dict())
    state["final_layer.linear.bias"] = torch.full_like(state["final_layer.linear.bias"], float("nan"))
    spoilt = tiny_models.write_safetensors(tiny.folder / "nan.safetensors", state, "diffusion-model")
    with pytest.raises(JobError, match="not finite"):
        tiny.picture(spoilt, *files[1:])


def test_long_prompt_is_cut_and_says_so(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """A prompt longer than the text encoder's 512 tokens still makes a picture, and says it was cut."""
    engine = DiffusionEngine("cpu", families=(tiny.family,))
    asked = request(files=files, defaults=SIZE, steps=1, prompt="word " * 200)
    assert engine.generate(asked, lambda done, total: None, Cancel()).meta["promptTruncated"] is True


def test_qwen_tokenizer_knows_its_words() -> None:
    """The tokenizer carried for the Qwen models gives the published ids, chat template included.

    The ids are those of Qwen2.5's and Qwen3's ``tokenizer.json``.
    """
    tokenizer = load_tokenizer(QWEN_TOKENIZER)
    assert tokenizer("Hello").input_ids == [9707]
    assert tokenizer("hello world").input_ids == [14990, 1879]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    assert tokenizer(chat).input_ids == [151644, 872, 198, 9707, 151645, 198, 151644, 77091, 198]
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (151643, "right")


def test_llama_cpp_names_are_ggufs() -> None:
    """The names under which a GGUF text encoder is read are those that the gguf library gives Qwen3."""
    published = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 36)
    with init_empty_weights():
        names = set(empty_model(Z_IMAGE.parts["text_encoder"]).state_dict())
    ours = {published.get_name(f"model.{name}", (".weight",)): name for name in names}
    found = from_llama_cpp(ours)
    assert {name: own for own, name in found.items()} == {name: name for name in names}


PUBLISHED = {
    "cap_embedder.0.weight": (2560,),
    "cap_embedder.1.weight": (3840, 2560),
    "cap_pad_token": (1, 3840),
    "context_refiner.1.feed_forward.w2.weight": (3840, 10240),
    "final_layer.linear.weight": (64, 3840),
    "layers.29.adaLN_modulation.0.weight": (15360, 256),
    "noise_refiner.1.adaLN_modulation.0.bias": (15360,),
    "noise_refiner.1.attention.k_norm.weight": (128,),
    "noise_refiner.1.attention.out.weight": (3840, 3840),
    "noise_refiner.1.attention.qkv.weight": (11520, 3840),
    "noise_refiner.1.feed_forward.w1.weight": (10240, 3840),
    "x_embedder.weight": (3840, 64),
}
"""Some of the 453 tensors of ``z_image_turbo_bf16.safetensors`` (Comfy-Org/z_image_turbo), as ComfyUI's
``lumina/model.py`` builds them and its header has them.
"""


def test_full_size_transformer_is_the_published_one() -> None:
    """The carried configuration builds what the 453 tensors of the published Z-Image-Turbo file fill."""
    with init_empty_weights():
        model = empty_model(Z_IMAGE.parts["transformer"])
    published = original_transformer(model.state_dict())
    assert len(published) == 453
    assert {name: tuple(published[name].shape) for name in PUBLISHED} == PUBLISHED
    assert sum(tensor.numel() for tensor in published.values()) == 6_154_908_736
    renamed = Z_IMAGE.parts["transformer"].layouts[0].rename(dict(published))
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_full_size_text_encoder_is_the_published_one() -> None:
    """The carried configuration builds the 398 tensors and 4,022,468,096 parameters of Qwen3-4B."""
    with init_empty_weights():
        state = empty_model(Z_IMAGE.parts["text_encoder"]).state_dict()
    assert len(state) == 398
    assert sum(tensor.numel() for tensor in state.values()) == 4_022_468_096
    shapes = {
        "embed_tokens.weight": (151936, 2560),
        "layers.35.self_attn.q_proj.weight": (4096, 2560),
        "layers.35.self_attn.k_proj.weight": (1024, 2560),
        "layers.35.self_attn.q_norm.weight": (128,),
        "layers.35.mlp.down_proj.weight": (2560, 9728),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_published_files_are_known(tmp_path: Path) -> None:
    """The published files of Z-Image-Turbo are recognised by their headers, in either naming."""
    with init_empty_weights():
        transformer, text_encoder, vae = (empty_model(part).state_dict() for part in Z_IMAGE.parts.values())
    published = {
        "z_image_turbo_bf16": ("diffusion-model", original_transformer(transformer)),
        "qwen_3_4b": ("text-encoder", tiny_models.prefixed(text_encoder, "model.")),
        "ae": ("vae", tiny_models.original_vae(vae, levels=4)),
    }
    files = []
    for name, (role, state) in published.items():
        path = write_header(tmp_path / f"{name}.safetensors", {n: tuple(t.shape) for n, t in state.items()})
        files.append(LocalFile(role, path, name))  # type: ignore[arg-type]
    assert identify(files).family.name == "z-image"
    prefixed = {
        n: tuple(t.shape) for n, t in tiny_models.prefixed(published["z_image_turbo_bf16"][1], PREFIX).items()
    }
    files[0] = files[0]._replace(path=write_header(tmp_path / "prefixed.safetensors", prefixed))
    assert identify(files).family.name == "z-image"


@pytest.mark.parametrize("layout", ["transformer.", "diffusion_model."])
def test_lora_works_on_quantised_weights(tiny: Tiny, files: tuple[LocalFile, ...], layout: str) -> None:
    """A LoRA, as diffusers or as ComfyUI's trainers save it, has on a GGUF transformer the effect it has on
    plain weights; the next job without it is as if there had been none.
    """
    generator = torch.Generator().manual_seed(5)
    lora, merged = {}, dict(tiny.stock.transformer.state_dict())
    for name in [name for name in merged if name.endswith(("to_q.weight", "w1.weight"))]:
        down = torch.randn(4, merged[name].shape[1], generator=generator) * 0.2
        up = torch.randn(merged[name].shape[0], 4, generator=generator) * 0.2
        stem = layout + name.removesuffix(".weight")
        lora |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        merged[name] = merged[name] + up @ down
    style = tiny_models.write_safetensors(tiny.folder / f"lora-{layout}safetensors", lora, "lora")
    quantised, reference = (
        tiny_models.write_gguf(
            tiny.folder / f"lora-{layout}{kind}.gguf",
            original_transformer(state),
            "diffusion-model",
            "lumina2",
            quantisation,
        )
        for kind, state, quantisation in (
            ("base", tiny.stock.transformer.state_dict(), Q8),
            ("merged", merged, None),
        )
    )
    engine = DiffusionEngine("cpu", families=(tiny.family,))

    def picture(*given: LocalFile) -> np.ndarray:
        asked = request(files=given, defaults=SIZE)
        return np.asarray(decoded(engine.generate(asked, lambda done, total: None, Cancel()).data), int)

    plain = picture(quantised, *files[1:])
    styled = picture(quantised, *files[1:], style)
    assert np.abs(styled - picture(reference, *files[1:])).mean() < 1
    assert np.abs(styled - plain).mean() > 3
    assert (picture(quantised, *files[1:]) == plain).all()
