"""Z-Image: tiny random models in every published file layout, against the library's own pipeline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import load_file

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.qwen import QWEN_TOKENIZER, from_llama_cpp
from studio_worker.engine.families.z_image import Z_IMAGE
from studio_worker.engine.files.sections import read_sections
from studio_worker.engine.loading import empty_model, load_part, load_tokenizer
from studio_worker.engine.memory.machine import weight_bytes
from studio_worker.engine.parameters import resolve
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.errors import JobError
from studio_worker.gpu_check.tiny import compvis, layouts
from studio_worker.gpu_check.tiny.quantised import Kind, piece, write_eight_bit, write_gguf
from studio_worker.gpu_check.tiny.weights import in_shards, prefixed, safetensors
from studio_worker.gpu_check.tiny.z_image import language_model
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import FileRole, LocalFile
from tests.lab.engine import decoded, encoded, request, scene, write_header
from tests.lab.quantising import DECODING, Q4, Q8, dequantised, numbers_of
from tests.lab.stock import alike
from tests.lab.tiny_z_image import (
    PREFIX,
    SIZE,
    Tiny,
    gguf_files,
    text_encoder_file,
    tiny_z_image,
    transformer_file,
    vae_file,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_z_image(tmp_path_factory.mktemp("z-image"))


@pytest.fixture(scope="module")
def files(tiny: Tiny) -> tuple[LocalFile, ...]:
    """The tiny model in safetensors: original transformer, transformers' Qwen3, ae.safetensors."""
    return transformer_file(tiny, "original"), text_encoder_file(tiny), vae_file(tiny)


@pytest.mark.parametrize("layout", ["diffusers", "original", "original, prefixed"])
def test_picture_is_the_stock_pipelines(tiny: Tiny, files: tuple[LocalFile, ...], layout: str) -> None:
    """From every published naming of the transformer, pixel for pixel what diffusers makes."""
    found = tiny.picture(transformer_file(tiny, layout), *files[1:])
    expected = tiny.expected()
    assert alike(found, expected)
    assert expected.std() > 10  # no flat picture


def test_vae_in_diffusers_layout(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """The VAE may come under diffusers' names too."""
    assert alike(tiny.picture(*files[:2], vae_file(tiny, "diffusers")), tiny.expected())


def test_whole_checkpoint_in_comfyuis_layout(tiny: Tiny) -> None:
    """All three components may come in one file of role model, as ComfyUI saves checkpoints.

    Source of the prefixes: ``comfy/supported_models.py``, ZImage and its ``process_*_state_dict_for_saving``.
    """
    text_encoder = prefixed(tiny.stock.text_encoder.state_dict(), "model.")
    state = {
        **prefixed(layouts.z_image(tiny.stock.transformer.state_dict()), PREFIX),
        **prefixed(text_encoder, "text_encoders.qwen3_4b.transformer."),
        **prefixed(compvis.vae(tiny.stock.vae.state_dict(), 3), "vae."),
    }
    file = safetensors(tiny.folder / "whole.safetensors", "model", state)
    assert alike(tiny.picture(file), tiny.expected())


def test_shards_of_one_component_are_one(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """Denoiser and text encoder in several files each, as their repositories publish them, make the same
    picture.
    """
    text = prefixed(tiny.stock.text_encoder.state_dict(), "model.")
    denoiser = tiny.stock.transformer.state_dict()
    shards = [
        *in_shards(tiny.folder / "dit", "diffusion-model", denoiser, 2),
        *in_shards(tiny.folder / "text", "text-encoder", text, 3),
    ]
    assert alike(tiny.picture(*shards, files[2]), tiny.expected())


def assert_refused(tiny: Tiny, text: str, *parts: LocalFile) -> None:
    """No picture is made of ``parts``, and no other worker need try; the message matches ``text``."""
    with pytest.raises(JobError, match=text) as caught:
        tiny.picture(*parts)
    assert caught.value.is_final_here


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_shard_that_is_missing_is_asked_for(tiny: Tiny, files: tuple[LocalFile, ...], left_out: int) -> None:
    """A component of which a file is missing is refused, by how many there are or by what it lacks."""
    text = prefixed(tiny.stock.text_encoder.state_dict(), "model.")
    shards = in_shards(tiny.folder / "text", "text-encoder", text, 3)
    del shards[left_out]
    assert_refused(
        tiny, r"published in 3 files: register all|lacks \d+ tensors of its", files[0], *shards, files[2]
    )


@pytest.mark.parametrize("given", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
@pytest.mark.parametrize("role", ["diffusion-model", "text-encoder"])
def test_split_gguf_is_refused_with_what_joins_it(
    tiny: Tiny, files: tuple[LocalFile, ...], role: FileRole, given: tuple[int, ...]
) -> None:
    """A GGUF file that llama-gguf-split took apart is refused by what its metadata say, whatever it is
    called; the message names what joins it.
    """
    whole = gguf_files(tiny, None, "unsplit")[role == "text-encoder"]
    tensors = list(numbers_of(whole).items())
    pieces = []
    for index, held in enumerate((tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :])):
        path = tiny.folder / f"{role}-{index}.gguf"
        pieces.append(write_gguf(path, role, dict(held), "qwen3", stated=piece(index, 2)))
    others = [each for each in files if each.role != role]
    assert_refused(
        tiny,
        r"-\d\.gguf .* one of 2 pieces .* llama-gguf-split --merge makes of them",
        *others,
        *(pieces[index] for index in given),
    )


@pytest.mark.parametrize("role", ["diffusion-model", "text-encoder"])
@pytest.mark.parametrize("given", [(0,), (2,), (0, 1)], ids=["first", "last", "two"])
def test_shards_that_are_not_all_there_are_refused_with_the_cure(
    tiny: Tiny, files: tuple[LocalFile, ...], role: FileRole, given: tuple[int, ...]
) -> None:
    """A component of which only some of its safetensors files are registered is refused, and the message
    says how many there are and to register them all.
    """
    state = load_file(next(each for each in files if each.role == role).path)
    shards = in_shards(tiny.folder / role, role, state, 3)
    others = [each for each in files if each.role != role]
    assert_refused(
        tiny,
        r"published in 3 files: register all of them with this role",
        *others,
        *(shards[index] for index in given),
    )


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
    assert alike(found, tiny.expected(guidance=2.0, negative_prompt="blue"))
    assert (found != tiny.expected()).any()


def test_picture_from_picture(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """Image-to-image is pixel for pixel what diffusers makes."""
    found = tiny.picture(*files, inputs=Inputs(encoded(scene())), denoise=0.6)
    assert alike(found, tiny.expected(picture=scene(), denoise=0.6))


def test_inpainting(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """Inside the mask the picture is diffusers' own; outside, every pixel is the initial picture's."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    found = tiny.picture(*files, inputs=Inputs(encoded(scene()), encoded(mask)), denoise=1.0)
    expected = tiny.expected(picture=scene(), mask=mask)
    inside = np.asarray(mask) > 0
    assert alike(found[inside], expected[inside])
    assert (found[~inside] == np.asarray(scene())[~inside]).all()


@pytest.mark.parametrize(("kind", "bound"), [(None, 0.001), (Q8, 0.5), (Q4, 10.0)])
@pytest.mark.parametrize("converter", ["city96", "stable-diffusion.cpp"])
def test_gguf_makes_nearly_the_same_picture(
    tiny: Tiny, files: tuple[LocalFile, ...], kind: Kind | None, bound: float, converter: str
) -> None:
    """From GGUF files the picture differs by few grey levels on average, unquantised by none; from what their
    numbers were made to, it hardly differs at all.
    """
    quantised = gguf_files(tiny, kind, f"{converter}-{kind}", ours="cpp" in converter)
    found = tiny.picture(*quantised, files[2])
    assert np.abs(found - tiny.expected()).mean() <= bound
    meant = tiny.picture(*map(dequantised, quantised), files[2])
    assert np.abs(found - meant).mean() <= (DECODING if kind else 0)


def test_rope_base_is_the_first_ones_whatever_a_file_states(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """A GGUF text encoder that states another rope base, as Qwen3-4B-Instruct-2507's do, makes the picture
    that stable-diffusion.cpp makes of it: read with the base of one million.
    """
    file = write_gguf(
        tiny.folder / "2507.gguf",
        "text-encoder",
        language_model(tiny.stock.text_encoder),
        "qwen3",
        stated={"rope.freq_base": 5e6},
    )
    assert alike(tiny.picture(files[0], file, files[2]), tiny.expected())


def test_stretched_positions_are_refused(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """A text encoder made for longer texts, whose positions are scaled, is refused with what to register."""
    file = write_gguf(
        tiny.folder / "yarn.gguf",
        "text-encoder",
        language_model(tiny.stock.text_encoder),
        "qwen3",
        stated={"rope.scaling.type": "yarn"},
    )
    assert_refused(
        tiny, r"rope scaling 'yarn'.* register the Qwen3-4B text encoder without", files[0], file, files[2]
    )


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
    state = layouts.z_image(tiny.stock.transformer.state_dict())
    state["final_layer.linear.bias"] = torch.full_like(state["final_layer.linear.bias"], float("nan"))
    spoilt = safetensors(tiny.folder / "nan.safetensors", "diffusion-model", state)
    with pytest.raises(JobError, match="not finite"):
        tiny.picture(spoilt, *files[1:])


def test_long_prompt_is_read_as_far_as_there_are_places(tiny: Tiny, files: tuple[LocalFile, ...]) -> None:
    """A prompt of more than 512 tokens is read to its end; one that the transformer has no places for still
    makes a picture, and says it was cut.
    """
    engine = DiffusionEngine("cpu", families=(tiny.family,))

    def make(prompt: str) -> Picture:
        asked = request(files=files, defaults=SIZE, steps=1, prompt=prompt)
        return engine.generate(asked, lambda done, total: None, Cancel())

    long = "word " * 180  # tokens are single bytes here
    assert "promptTruncated" not in make(f"{long} red").meta
    assert decoded(make(f"{long} red").data) != decoded(make(f"{long} blue").data)
    assert make(long * 2).meta["promptTruncated"] is True


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
    published = layouts.z_image(model.state_dict())
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
        "z_image_turbo_bf16": ("diffusion-model", layouts.z_image(transformer)),
        "qwen_3_4b": ("text-encoder", prefixed(text_encoder, "model.")),
        "ae": ("vae", compvis.vae(vae, levels=4)),
    }
    files = []
    for name, (role, state) in published.items():
        path = write_header(tmp_path / f"{name}.safetensors", {n: tuple(t.shape) for n, t in state.items()})
        files.append(LocalFile(role, path, name))  # type: ignore[arg-type]
    assert identify(files).family.name == "z-image"
    with_prefix = {n: tuple(t.shape) for n, t in prefixed(published["z_image_turbo_bf16"][1], PREFIX).items()}
    files[0] = files[0]._replace(path=write_header(tmp_path / "prefixed.safetensors", with_prefix))
    assert identify(files).family.name == "z-image"


@pytest.mark.parametrize("form", ["gguf", "fp8"])
@pytest.mark.parametrize("layout", ["transformer.", "diffusion_model."])
def test_lora_works_on_quantised_weights(
    tiny: Tiny, files: tuple[LocalFile, ...], layout: str, form: str
) -> None:
    """A LoRA, as diffusers or as ComfyUI's trainers save it, has on a GGUF transformer, and on one of 8-bit
    floats, the effect it has on plain weights; the next job without it is as if there had been none.
    """
    generator = torch.Generator().manual_seed(5)
    lora, merged = {}, dict(tiny.stock.transformer.state_dict())
    for name in [name for name in merged if name.endswith(("to_q.weight", "w1.weight"))]:
        down = torch.randn(4, merged[name].shape[1], generator=generator) * 0.2
        up = torch.randn(merged[name].shape[0], 4, generator=generator) * 0.2
        stem = layout + name.removesuffix(".weight")
        lora |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        merged[name] = merged[name] + up @ down
    style = safetensors(tiny.folder / f"lora-{layout}safetensors", "lora", lora)
    base, role = layouts.z_image(tiny.stock.transformer.state_dict()), "diffusion-model"
    quantised = (
        write_eight_bit(tiny.folder / "base.safetensors", role, base)
        if form == "fp8"
        else write_gguf(tiny.folder / "base.gguf", role, base, "lumina2", Q8)
    )
    merged = layouts.z_image(merged)
    reference = safetensors(tiny.folder / "merged.safetensors", role, merged)
    bound = 4 if form == "fp8" else 1
    engine = DiffusionEngine("cpu", families=(tiny.family,))

    def picture(*given: LocalFile) -> np.ndarray:
        asked = request(files=given, defaults=SIZE)
        return np.asarray(decoded(engine.generate(asked, lambda done, total: None, Cancel()).data), int)

    plain = picture(quantised, *files[1:])
    styled = picture(quantised, *files[1:], style)
    assert np.abs(styled - picture(reference, *files[1:])).mean() < bound
    assert np.abs(styled - plain).mean() > 3
    assert (picture(quantised, *files[1:]) == plain).all()


def test_prompt_is_read_where_the_model_computes(tiny: Tiny) -> None:
    """The prompt's tokens go where the model works, which is not where its offloaded components wait."""
    seen = []

    def text_encoder(input_ids: torch.Tensor, **_: object) -> object:
        seen.append(input_ids.device.type)
        return SimpleNamespace(hidden_states=[torch.zeros(1, input_ids.shape[1], 4)] * 3)

    parts = {"tokenizer": tiny.stock.tokenizer, "transformer": tiny.stock.transformer}
    pipeline = SimpleNamespace(**parts, text_encoder=text_encoder)
    parameters = resolve(request().task, SIZE, tiny.family.defaults, from_image=False)
    tiny.family.encode(pipeline, parameters, torch.device("meta"))
    assert seen == ["meta"]
