"""LoRAs of every kind, in every layout, for every family: as if they had been merged by hand.

The judge is the engine without LoRAs on weights that were merged here, in the names of the published file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.memory.placement import Mode
from studio_worker.engine.rendering.needs import footprint
from studio_worker.gpu_check.tiny.families import tiny as tiny_model
from studio_worker.gpu_check.tiny.model import Form, Tiny
from studio_worker.gpu_check.tiny.weights import state
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import CliDefaults, FileRole, LocalFile
from tests.fakes.played_gpu import played
from tests.lab.engine import decoded, request
from tests.lab.lora_kinds import BIASES, FILTERS, MATRICES, NORMS, Made
from tests.lab.memory import GIB, Fake

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed:FutureWarning"),
]

DEFAULTS = CliDefaults(width=64, height=64, steps=2, cfg_scale=1.0, sampling_method="euler")
WIDTH, PROMPT = 64, "a red potion on grass"

_TABLES = ("token_embedding", "position_embedding", "embed_tokens", "shared", "relative_attention")
_OTHERS = ("visual.", "lm_head.")
"""What lies in a text encoder's file and is no part of it."""


class Component:
    """A part of a model in a file of its own.

    Args:
        prefix: what its tensors' names begin with in a file, and not in LoRAs.
    """

    def __init__(
        self, part: str, role: FileRole, tensors: Mapping[str, torch.Tensor], prefix: str = ""
    ) -> None:
        self.part, self.role, self.prefix = part, role, prefix
        self.tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def layers(self) -> list[str]:
        """Those that LoRAs are for, as the file names them; not vocabularies, and not tables of places."""
        return [
            name.removesuffix(".weight")
            for name in self.tensors
            if name.endswith(".weight")
            and not any(each in name for each in _TABLES)
            and not name.startswith(_OTHERS)
        ]


class Model:
    """A tiny model in one layout, and its LoRA of all kinds at once."""

    def __init__(self, tiny: Tiny, layout: str, denoiser: Mapping[str, torch.Tensor] | None = None) -> None:
        self.tiny, self.family = tiny, tiny.family
        self.components = list(_components(tiny, layout))
        if denoiser is not None:
            self.components[0] = Component(tiny.family.denoiser, "diffusion-model", denoiser)
        self.made: dict[tuple[str, str], Made] = {}
        self.biases: dict[tuple[str, str], tuple[str, torch.Tensor]] = {}
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        kinds = {1: cycle(NORMS.values()), 2: cycle(MATRICES.values()), 4: cycle(FILTERS.values())}
        ends = cycle(BIASES)
        for component in self.components:
            for layer in component.layers():
                weight = component.tensors[f"{layer}.weight"]
                self.made[component.part, layer] = next(kinds[weight.ndim])(weight, draw)
                bias = component.tensors.get(f"{layer}.bias")
                if bias is not None:
                    self.biases[component.part, layer] = next(ends), 0.3 * draw(*bias.shape)

    def files(self, folder: Path, merged: float = 0.0) -> tuple[LocalFile, ...]:
        """All its files, the LoRA merged into them at so much of its strength."""
        files = []
        for component in self.components:
            tensors = dict(component.tensors)
            for (part, layer), made in self.made.items() if merged else ():
                if part == component.part:
                    plain = tensors[f"{layer}.weight"]
                    tensors[f"{layer}.weight"] = plain + merged * (made.merged - plain)
            for (part, layer), (_, change) in self.biases.items() if merged else ():
                if part == component.part:
                    tensors[f"{layer}.bias"] = tensors[f"{layer}.bias"] + merged * change
            files.append(written(folder / f"{component.part}-{merged}", component.role, tensors))
        vae = self.tiny.published.get("vae")
        tensors = state(self.tiny.parts["vae"]) if vae is None else vae.tensors
        return (*files, written(folder / "vae", "vae", tensors))

    def lora(self, path: Path, named: Callable[[str, str, str], str]) -> LocalFile:
        tensors = {}
        for component in self.components:
            for layer in component.layers():
                name = layer.removeprefix(component.prefix)
                key = component.part, layer
                for end, tensor in self.made[key].tensors.items():
                    tensors[named(component.part, name, end)] = tensor
                if key in self.biases:
                    end, change = self.biases[key]
                    if end == "bias":
                        change = change + component.tensors[f"{layer}.bias"]
                    tensors[named(component.part, name, end)] = change
        return written(path, "lora", tensors)


def _components(tiny: Tiny, layout: str) -> Any:
    denoiser = tiny.family.denoiser
    readers = [name for name, part in tiny.family.parts.items() if part.role == "text-encoder"]
    if layout == "diffusers":
        yield Component(denoiser, "diffusion-model", state(tiny.parts[denoiser]))
    elif "model" in tiny.published:
        yield Component(
            denoiser, "diffusion-model", tiny.published["model"].tensors, "model.diffusion_model."
        )
    else:
        yield Component(denoiser, "diffusion-model", tiny.published[denoiser].tensors)
    for name in readers:
        published = tiny.published.get(name)
        if published is not None:
            yield Component(name, "text-encoder", published.tensors)
        else:
            own = state(tiny.parts[name])
            wrapped = {
                each if each.startswith(("text_model.", "text_projection")) else f"text_model.{each}": tensor
                for each, tensor in own.items()
            }
            yield Component(name, "text-encoder", wrapped)


def written(path: Path, role: FileRole, tensors: Mapping[str, torch.Tensor], **options: Any) -> LocalFile:
    path = path.with_name(f"{path.name}.safetensors")
    if not path.exists():
        save_file({name: each.contiguous().clone() for name, each in tensors.items()}, path, **options)
    return LocalFile(role, path, str(path))


# --- layouts ---


def flat(unet: str) -> Callable[[str, str, str], str]:
    """kohya-ss' names, musubi-tuner's and OneTrainer's."""

    def named(part: str, layer: str, end: str) -> str:
        stem = (
            unet
            if not part.startswith("text")
            else f"lora_te{part.removeprefix('text_encoder').strip('_') or 1}"
        )
        return f"{stem}_{layer.replace('.', '_')}.{end}"

    return named


def _peft(end: str) -> str:
    return {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(end, end)


def comfy(part: str, layer: str, end: str) -> str:
    """ComfyUI's and ai-toolkit's names."""
    stem = "text_encoders." + ["clip_l", "clip_g", "t5xxl"][int(part[-1:]) - 1 if part[-1:].isdigit() else 0]
    return (
        f"{stem}.transformer.{layer}.{_peft(end)}"
        if part.startswith("text")
        else f"diffusion_model.{layer}.{_peft(end)}"
    )


def diffusers(part: str, layer: str, end: str) -> str:
    return f"{part}.{layer}.{_peft(end)}"


def bare(part: str, layer: str, end: str) -> str:
    """lightx2v's and DiffSynth-Studio's names: nothing before the denoiser's."""
    end = (
        _peft(end)
        .replace("lora_A.weight", "lora_A.default.weight")
        .replace("lora_B.weight", "lora_B.default.weight")
    )
    return f"{part}.{layer}.{end}" if part.startswith("text") else f"{layer}.{end}"


LAYOUTS = {
    "kohya": ("original", flat("lora_unet")),
    "ComfyUI": ("original", comfy),
    "diffusers": ("diffusers", diffusers),
    "OneTrainer": ("diffusers", flat("lora_transformer")),
    "DiffSynth": ("diffusers", bare),
}
FAMILIES = (
    "sd1",
    "sd2",
    "sdxl",
    "sd3-medium",
    "sd3.5-medium",
    "flux1-dev",
    "chroma",
    "z-image",
    "qwen-image",
)


class Bench:
    """Models, and what their merged weights make, made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tinies: dict[str, Tiny] = {}
        self._models: dict[tuple[str, str], Model] = {}
        self._pictures: dict[
            tuple[str, str], tuple[DiffusionEngine, tuple[LocalFile, ...], Picture, Picture]
        ] = {}

    def model(self, family: str, layout: str) -> Model:
        if family not in self._tinies:
            self._tinies[family] = tiny_model(family, self.folder(family, "tiny"), WIDTH)
        if (family, layout) not in self._models:
            self._models[family, layout] = Model(self._tinies[family], layout)
        return self._models[family, layout]

    def folder(self, family: str, layout: str) -> Path:
        folder = self._folder / f"{family}-{layout}"
        folder.mkdir(exist_ok=True)
        return folder

    def pictures(
        self, family: str, layout: str
    ) -> tuple[DiffusionEngine, tuple[LocalFile, ...], Picture, Picture]:
        """An engine with the plain model, its files, its picture, and that of the merged weights."""
        if (family, layout) not in self._pictures:
            model, folder = self.model(family, layout), self.folder(family, layout)
            engine = DiffusionEngine("cpu", families=[model.family])
            expected = make(engine, model.files(folder, merged=1.0))
            files = model.files(folder)
            self._pictures[family, layout] = engine, files, make(engine, files), expected
        return self._pictures[family, layout]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("loras"))


def make(engine: DiffusionEngine, files: tuple[LocalFile, ...], **task: Any) -> Picture:
    asked = request(files=files, **{"prompt": PROMPT, "defaults": DEFAULTS} | task)
    return engine.generate(asked, lambda done, total: None, Cancel())


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(decoded(picture.data), dtype=int)


def apart(one: Picture, other: Picture) -> tuple[float, int]:
    """By how many grey levels on the average, and at most."""
    difference = np.abs(pixels(one) - pixels(other))
    return float(difference.mean()), int(difference.max())


@pytest.mark.parametrize("naming", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_as_if_merged(bench: Bench, family: str, naming: str) -> None:
    """A LoRA of all layers of denoiser and text encoders, one of each kind in turn, makes the picture of the
    weights merged by hand, and leaves the next picture as it was before.
    """
    layout, named = LAYOUTS[naming]
    engine, files, plain, expected = bench.pictures(family, layout)
    lora_file = bench.model(family, layout).lora(bench.folder(family, layout) / f"lora-{naming}", named)
    found = make(engine, (*files, lora_file))
    assert apart(expected, plain)[0] > 5
    assert apart(found, expected)[1] <= 2
    assert "lorasLeftOut" not in found.meta
    assert make(engine, files).data == plain.data


@pytest.mark.parametrize("family", ["sdxl", "flux1-dev"])
def test_lora_at_half_its_strength_is_half_way(bench: Bench, family: str) -> None:
    """At a weight of 0.5 every kind takes the weights half way, a DoRA too."""
    layout, named = LAYOUTS["kohya"]
    engine, files, plain, _ = bench.pictures(family, layout)
    model, folder = bench.model(family, layout), bench.folder(family, layout)
    style = model.lora(folder / "style", named)
    expected = make(engine, model.files(folder, merged=0.5))
    found = make(engine, (*files, style), prompt=f"{PROMPT}<lora:style:0.5>")
    assert apart(expected, plain)[0] > 2
    assert apart(found, expected)[1] <= 2


@pytest.mark.parametrize("family", ["sd1", "z-image"])
def test_lora_of_every_kind_comes_and_goes_with_its_layers(bench: Bench, family: str) -> None:
    """Component by component, or layer by layer, a GPU makes the pictures that it makes of the whole model,
    with every kind of LoRA and then without.
    """
    layout, named = LAYOUTS["diffusers"]
    model, folder = bench.model(family, layout), bench.folder(family, layout)
    files, style = model.files(folder), model.lora(folder / "style", named)
    needed = footprint(identify(files, (model.family,)), "float16", 64 * 64, loras=(style,))
    layers = next(p.peak_bytes for p in needed.plans() if p.mode is Mode.LAYERS and not p.tiled)

    def pictures(room: int, *, offload: bool) -> list[bytes]:
        defaults = DEFAULTS.model_copy(update={"offload_to_cpu": offload, "steps": 1})
        memory = Fake(room, host=GIB)
        engine = DiffusionEngine("cuda:1", families=[model.family], memory=memory)
        made = [make(engine, each, defaults=defaults) for each in (files, (*files, style), files)]
        modes = {each.meta.get("offload", "whole") for each in made}
        assert modes == {"layers" if room < GIB else "component" if offload else "whole"}
        return [each.data for each in made]

    with played("cuda:1"):
        whole = pictures(GIB, offload=False)
        assert whole[0] == whole[2] != whole[1]
        assert pictures(GIB, offload=True) == whole
        assert pictures(layers, offload=True) == whole


@pytest.mark.parametrize("family", ["sdxl", "flux1-dev", "z-image"])
def test_memory_of_a_lora_is_planned_for(bench: Bench, family: str) -> None:
    """What every kind of LoRA takes beside a model is what was planned for, to within a tenth."""
    layout, named = LAYOUTS["kohya"]
    engine, files, _, _ = bench.pictures(family, layout)
    model, folder = bench.model(family, layout), bench.folder(family, layout)
    style = model.lora(folder / "lora-kohya", named)

    def size_bytes(*loras: LocalFile) -> int:
        make(engine, (*files, *loras))
        return engine.resident()["sample-model"].size_bytes

    plain = size_bytes()
    planned = footprint(identify(files, (model.family,)), "float32", 64 * 64, loras=(style,)).loras
    assert 0.9 * planned < size_bytes(style) - plain <= planned


@pytest.mark.parametrize("form", ["Q8_0", "8-bit"])
def test_lora_works_on_packed_weights(bench: Bench, tmp_path: Path, form: Form) -> None:
    """On matrices in GGUF's blocks, or in 8-bit floats, every kind does what it does on their numbers."""
    _, named = LAYOUTS["ComfyUI"]
    tiny = bench.model("z-image", "original").tiny
    packed = tiny.file("transformer", form)
    numbers = decoded_blocks(packed.path) if form == "Q8_0" else decoded_floats(packed.path)
    model = Model(tiny, "original", numbers)
    engine = DiffusionEngine("cpu", families=[tiny.family])
    expected = make(engine, model.files(tmp_path, merged=1.0))
    files = (packed, *model.files(tmp_path)[1:])
    plain = make(engine, files)
    found = make(engine, (*files, model.lora(tmp_path / "style", named)))
    assert apart(expected, plain)[0] > 5
    assert apart(found, expected)[1] <= 3
    assert make(engine, files).data == plain.data


def decoded_blocks(path: Path) -> dict[str, torch.Tensor]:
    """What the gguf library makes of a file's numbers."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def decoded_floats(path: Path) -> dict[str, torch.Tensor]:
    """The numbers of ComfyUI's 8-bit files: those of a matrix times the scale beside it."""
    tensors, one = load_file(path), torch.ones(())
    return {
        name: tensor.float() * tensors.get(f"{name.removesuffix('.weight')}.scale_weight", one)
        for name, tensor in tensors.items()
        if not name.endswith("scale_weight")
    }
