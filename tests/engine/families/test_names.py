"""Published names: what stands before a component's tensors differs by the library, and its version, that
wrote the file. Each makes the picture that the usual names make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.errors import JobError, NotServed
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.gpu_check.tiny.quantised import without_outer_ones, write_gguf
from studio_worker.gpu_check.tiny.stable_diffusion import UNET, VAE, unet_and_vae
from studio_worker.gpu_check.tiny.weights import Tensors, prefixed, safetensors
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import decoded, encoded, request, scene

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIZE = CliDefaults(width=64, height=64, steps=1, cfg_scale=1.0, sampling_method="euler")
WIDTH = 32


class Shelf:
    """Tiny models by their family's name, each with an engine, and its picture under its usual names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, Tiny] = {}
        self._files: dict[str, dict[str, LocalFile]] = {}
        self._engines: dict[str, DiffusionEngine] = {}
        self._pictures: dict[tuple[str, bool], np.ndarray] = {}

    def model(self, name: str) -> Tiny:
        if name not in self._models:
            (self._folder / name).mkdir()
            model = tiny(name, self._folder / name, WIDTH)
            self._models[name] = model
            written = {part: file.write(model.folder) for part, file in model.published.items()}
            self._files[name] = {part: file for part, file in written.items() if file is not None}
            self._engines[name] = DiffusionEngine("cpu", families=(model.family,))
        return self._models[name]

    def files(self, name: str, **changed: LocalFile) -> list[LocalFile]:
        """All files of a model, but for those of the parts that are ``changed``."""
        self.model(name)
        return list((self._files[name] | changed).values())

    def picture(self, name: str, *files: LocalFile, is_edit: bool = False) -> np.ndarray:
        self.model(name)
        return picture(self._engines[name], *files, is_edit=is_edit)

    def expected(self, name: str, *, is_edit: bool = False) -> np.ndarray:
        key = (name, is_edit)
        if key not in self._pictures:
            self._pictures[key] = self.picture(name, *self.files(name), is_edit=is_edit)
        return self._pictures[key]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("names"))


def picture(engine: DiffusionEngine, *files: LocalFile, is_edit: bool = False) -> np.ndarray:
    inputs = Inputs(ref_image=encoded(scene())) if is_edit else Inputs()
    asked = request(files=files, defaults=SIZE, prompt="a red potion", inputs=inputs)
    return np.asarray(decoded(engine.generate(asked, lambda _done, _total: None, Cancel()).data), dtype=int)


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def below(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda state: prefixed(state, prefix)


def instead(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in state.items()
    }


def language_alone(state: Tensors) -> Tensors:
    """As Qwen2_5_VLTextModel saves itself."""
    return {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}


NAMINGS: list[tuple[str, str, str, Callable[[Tensors], Tensors]]] = [
    ("flux1-dev", "text_encoder", "CLIPTextModel of transformers 5", without("text_model.")),
    ("flux1-dev", "text_encoder", "ComfyUI's", below("text_encoders.clip_l.transformer.")),
    ("flux1-dev", "text_encoder_2", "T5Stack", without("encoder.")),
    ("flux1-dev", "text_encoder_2", "ComfyUI's", below("text_encoders.t5xxl.transformer.")),
    ("flux1-dev", "transformer", "folder", below("transformer.")),
    ("sd3-medium", "text_encoder", "CLIPTextModel of transformers 5", without("text_model.")),
    (
        "sd3-medium",
        "text_encoder_2",
        "CLIPTextModelWithProjection without its wrapper",
        without("text_model."),
    ),
    (
        "sd3-medium",
        "text_encoder_2",
        "stable-diffusion.cpp's",
        instead("text_projection.weight", "text_model.text_projection"),
    ),
    ("sd3-medium", "text_encoder_3", "T5Stack", without("encoder.")),
    ("chroma", "text_encoder", "T5Stack", without("encoder.")),
    ("z-image", "text_encoder", "Qwen3Model", without("model.")),
    ("z-image", "text_encoder", "one that sees", instead("model.", "model.language_model.")),
    ("z-image", "text_encoder", "of the same, without its head", instead("model.", "language_model.")),
    ("z-image", "text_encoder", "stable-diffusion.cpp's", below("text_encoders.llm.")),
    (
        "qwen-image",
        "text_encoder",
        "transformers 4.52",
        lambda s: instead("visual.", "model.visual.")(instead("model.", "model.language_model.")(s)),
    ),
    ("qwen-image", "text_encoder", "without its head", instead("model.", "language_model.")),
    ("qwen-image", "text_encoder", "Qwen2_5_VLTextModel", language_alone),
]


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [(name, part, change) for name, part, _, change in NAMINGS],
    ids=[f"{name}-{part}-{what}" for name, part, what, _ in NAMINGS],
)
def test_names_that_libraries_write_make_the_same_picture(
    shelf: Shelf, name: str, part: str, change: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    """A component whose names another library, or another version, wrote works like the usual file."""
    model = shelf.model(name)
    published = model.published[part]
    renamed = change(dict(published.tensors))
    assert renamed.keys() != published.tensors.keys()
    file = safetensors(tmp_path / "renamed.safetensors", published.role, renamed)
    assert (shelf.picture(name, *shelf.files(name, **{part: file})) == shelf.expected(name)).all()


def test_vision_encoder_within_a_whole_checkpoint_sees(shelf: Shelf, tmp_path: Path) -> None:
    """A checkpoint in one file that holds denoiser, VAE and a text encoder that sees serves edits too."""
    model = shelf.model("qwen-image")
    names = {
        "transformer": "model.diffusion_model.",
        "text_encoder": "text_encoders.qwen25_7b.transformer.",
        "vae": "vae.",
    }
    whole = {}
    for part, prefix in names.items():
        whole |= prefixed(model.published[part].tensors, prefix)
    file = safetensors(tmp_path / "whole.safetensors", "model", whole)
    assert (
        shelf.picture("qwen-image", file, is_edit=True) == shelf.expected("qwen-image", is_edit=True)
    ).all()


@pytest.mark.parametrize("name", ["sd2", "sdxl", "flux1-dev", "sd3-medium"])
def test_diffusers_folders_in_one_file(shelf: Shelf, name: str, tmp_path: Path) -> None:
    """The components of a folder of diffusers in one file, each below the name of its own, are a model."""
    model = shelf.model(name)
    whole: Tensors = {}
    for part, module in model.parts.items():
        own = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        whole |= prefixed(own, f"{part}.")
    file = safetensors(tmp_path / "whole.safetensors", "model", whole)
    assert (shelf.picture(name, file) == shelf.expected(name)).all()


def test_diffusers_folders_of_a_model_that_sees(shelf: Shelf, tmp_path: Path) -> None:
    """In such a file the vision encoder stands within the text encoder, and reads a reference picture."""
    whole: Tensors = {}
    for part, module in shelf.model("qwen-image").parts.items():
        whole |= prefixed(module.state_dict(), f"{part}.")
    file = safetensors(tmp_path / "whole.safetensors", "model", whole)
    assert (
        shelf.picture("qwen-image", file, is_edit=True) == shelf.expected("qwen-image", is_edit=True)
    ).all()


def test_open_clips_projection_as_a_layer(shelf: Shelf, tmp_path: Path) -> None:
    """A Stable Diffusion XL whose open_clip text encoder has its projection as a layer's weight works."""
    place = "conditioner.embedders.1.model.text_projection"
    state = dict(shelf.model("sdxl").published["model"].tensors)
    state[f"{place}.weight"] = state.pop(place).T.contiguous()
    file = safetensors(tmp_path / "layer.safetensors", "model", state)
    assert (shelf.picture("sdxl", file) == shelf.expected("sdxl")).all()


# --- stable-diffusion.cpp's GGUF files ---


def fused(state: Mapping[str, torch.Tensor]) -> Tensors:
    """transformers' CLIP with queries, keys and values in one, as stable-diffusion.cpp keeps open_clip's."""
    renamed: Tensors = {}
    for name, tensor in state.items():
        stem, found, rest = name.partition("self_attn.q_proj.")
        if found:
            whole = [state[f"{stem}self_attn.{each}_proj.{rest}"] for each in "qkv"]
            renamed[f"{stem}self_attn.in_proj.{rest}"] = torch.cat(whole)
        elif "self_attn.k_proj." not in name and "self_attn.v_proj." not in name:
            renamed[name] = tensor
    return renamed


def whole(state: Mapping[str, torch.Tensor]) -> Tensors:
    return dict(state)


@pytest.mark.parametrize("form", [whole, fused])
def test_xl_of_stable_diffusion_cpp(
    shelf: Shelf, form: Callable[[Mapping[str, torch.Tensor]], Tensors], tmp_path: Path
) -> None:
    """A Stable Diffusion XL that stable-diffusion.cpp wrote as GGUF: its names, open_clip's projection, outer
    dimensions of 1 left out.
    """
    model = shelf.model("sdxl")
    second = dict(model.parts["text_encoder_2"].state_dict())
    second["text_model.text_projection"] = second.pop("text_projection.weight").T.contiguous()
    first = prefixed(model.parts["text_encoder"].state_dict(), "text_model.")
    state = {
        **unet_and_vae(model.parts),
        **prefixed(first, "cond_stage_model.transformer."),
        **prefixed(form(second), "cond_stage_model.1.transformer."),
    }
    file = write_gguf(tmp_path / "xl.gguf", "model", without_outer_ones(state), "sd")
    assert (shelf.picture("sdxl", file) == shelf.expected("sdxl")).all()


def test_sd2_of_stable_diffusion_cpp(shelf: Shelf, tmp_path: Path) -> None:
    """A Stable Diffusion 2 that stable-diffusion.cpp wrote as GGUF, its text encoder under transformers'
    names with open_clip's matrices.
    """
    model = shelf.model("sd2")
    text = fused(prefixed(model.parts["text_encoder"].state_dict(), "text_model."))
    state = unet_and_vae(model.parts) | prefixed(text, "cond_stage_model.transformer.")
    file = write_gguf(tmp_path / "sd2.gguf", "model", without_outer_ones(state), "sd")
    assert (shelf.picture("sd2", file) == shelf.expected("sd2")).all()


def test_sd3_of_stable_diffusion_cpp(shelf: Shelf, tmp_path: Path) -> None:
    """A whole Stable Diffusion 3 that stable-diffusion.cpp wrote as GGUF: its table of places has no outer 1,
    and CLIP-G's projection is transformers'.
    """
    model = shelf.model("sd3-medium")
    names = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
    state = prefixed(model.published["transformer"].tensors, UNET)
    state |= prefixed(model.published["vae"].tensors, VAE)
    for name, part in names.items():
        text = instead("text_projection.weight", "text_model.text_projection")(model.published[part].tensors)
        state |= prefixed(text, f"text_encoders.{name}.transformer.")
    file = write_gguf(tmp_path / "sd3.gguf", "model", without_outer_ones(state), "sd")
    assert (shelf.picture("sd3-medium", file) == shelf.expected("sd3-medium")).all()


def test_quantised_t5_under_transformers_names(shelf: Shelf, tmp_path: Path) -> None:
    """A quantised T5 with transformers' names, as stable-diffusion.cpp writes it, makes the picture of the
    same under llama.cpp's.
    """
    model = shelf.model("flux1-dev")
    published = model.published["text_encoder_2"]
    kind = gguf.GGMLQuantizationType.Q8_0
    pictures = []
    for index, tensors in enumerate((published.tensors, published.in_gguf)):
        assert tensors is not None
        t5 = write_gguf(tmp_path / f"{index}.gguf", "text-encoder", tensors, "t5encoder", kind)
        pictures.append(shelf.picture("flux1-dev", *shelf.files("flux1-dev", text_encoder_2=t5)))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != shelf.expected("flux1-dev")).any()


# --- what a model predicts, where only its metadata say it ---


def with_metadata(model: Tiny, path: Path, metadata: dict[str, str]) -> LocalFile:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.published["model"].tensors.items()}
    save_file(tensors, path, metadata=metadata)
    return LocalFile("model", path, str(path))


V_WORDS: list[tuple[dict[str, str], str]] = [
    ({"modelspec.prediction_type": "v"}, "sdxl-v"),
    ({"modelspec.prediction_type": "v_prediction"}, "sdxl-v"),
    ({"modelspec.predict_key": "v"}, "sdxl-v"),
    ({"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, "sdxl-v-zsnr"),
    ({"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "False"}, "sdxl-v"),
    ({"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "True"}, "sdxl"),
    ({"modelspec.title": "x" * 5_000_000}, "sdxl"),
]


@pytest.mark.parametrize(
    ("metadata", "name"), V_WORDS, ids=[f"{index}-{name}" for index, (_, name) in enumerate(V_WORDS)]
)
def test_prediction_that_stands_in_the_metadata_alone(
    shelf: Shelf, metadata: dict[str, str], name: str, tmp_path: Path
) -> None:
    """A Stable Diffusion XL that says in its metadata alone that it predicts v makes the picture of one that
    says so by its tensors.
    """
    model = shelf.model("sdxl")
    kinds = [shelf.model(each) for each in ("sdxl-v-zsnr", "sdxl-v", "sdxl")]
    families = tuple(each.family for each in kinds)
    file = with_metadata(model, tmp_path / "v.safetensors", metadata)
    engine = DiffusionEngine("cpu", families=families)
    asked = request(files=(file,), defaults=SIZE, prompt="a red potion")
    made = engine.generate(asked, lambda _done, _total: None, Cancel())
    assert made.meta["family"] == f"tiny-{name}"
    expected = shelf.expected(name)
    assert (np.asarray(decoded(made.data), dtype=int) == expected).all()


@pytest.mark.parametrize(
    ("name", "says"), [("sdxl", "sample"), ("sdxl", "flow"), ("sd1", "v"), ("sdxl-inpaint", "v")]
)
def test_prediction_that_is_not_served_is_refused_by_name(
    shelf: Shelf, name: str, says: str, tmp_path: Path
) -> None:
    """A model that says of itself that it predicts what its family does not is refused before it makes a
    wrong picture.
    """
    model = shelf.model(name)
    file = with_metadata(model, tmp_path / "x.safetensors", {"modelspec.prediction_type": says})
    with pytest.raises(NotServed, match=rf"x\.safetensors \(model\) says that it predicts '{says}'"):
        identify([file], [model.family])


def test_cosxl_is_refused_by_name(shelf: Shelf, tmp_path: Path) -> None:
    """CosXL, which is shaped like Stable Diffusion XL with another noise schedule, is not taken for one."""
    state = shelf.model("sdxl").published["model"].tensors | {"edm_vpred.sigma_max": torch.ones(1)}
    file = safetensors(tmp_path / "cos.safetensors", "model", state)
    with pytest.raises(JobError, match="is CosXL, which this worker does not serve"):
        identify([file], [shelf.model("sdxl").family])
