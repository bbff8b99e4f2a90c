"""What stands in LoRA files beside the factors, and which files are refused before anything is loaded."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from studio_worker import sample_model
from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.errors import FileDamaged, JobError
from studio_worker.gpu_check.tiny.families import tiny as tiny_model
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import SAMPLE, decoded, encoded, request, scene
from tests.lab.headers import with_metadata

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

DENOISER = "model.diffusion_model."
READER = "cond_stage_model.transformer.text_model."
DEFAULTS = CliDefaults(width=64, height=64, steps=2, cfg_scale=4.0)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain() -> Tensors:
    return load_file(sample_model.WEIGHTS)


@pytest.fixture
def engine() -> DiffusionEngine:
    return DiffusionEngine("cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_model("flux1-dev", tmp_path_factory.mktemp("flux"), 32)


def make(engine: DiffusionEngine, *files: LocalFile, **task: Any) -> Picture:
    asked = request(files=files, defaults=DEFAULTS, **task)
    return engine.generate(asked, lambda done, total: None, Cancel())


def written(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> LocalFile:
    save_file({name: each.clone().contiguous() for name, each in tensors.items()}, path, metadata)
    return LocalFile("lora", path, str(path))


def far(one: Picture, other: Picture) -> tuple[float, int]:
    """By how many grey levels on the average, and at most."""
    found, expected = (np.asarray(decoded(each.data), dtype=int) for each in (one, other))
    apart = np.abs(found - expected)
    return float(apart.mean()), int(apart.max())


def layers(plain: Tensors, end: str) -> list[str]:
    """The denoiser's, by the ends of their published names."""
    stems = [
        name.removeprefix(DENOISER).removesuffix(".weight") for name in plain if name.startswith(DENOISER)
    ]
    return [stem for stem in stems if stem.endswith(end)]


def factors(plain: Tensors, layer: str, seed: int = 0, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up for a layer of the denoiser, of an effect that shows."""
    generator = torch.Generator().manual_seed(seed)
    out, into = plain[f"{DENOISER}{layer}.weight"].shape[:2]
    down, up = (torch.randn(shape, generator=generator) for shape in ((rank, into), (out, rank)))
    return down * 0.3, up * 0.3


def merged(path: Path, plain: Tensors, changes: Mapping[str, torch.Tensor]) -> LocalFile:
    """The sample model with these changes of its weights."""
    whole = {name: tensor.float() for name, tensor in plain.items()}
    for layer, change in changes.items():
        name = next(
            f"{prefix}{layer}.weight" for prefix in (DENOISER, READER) if f"{prefix}{layer}.weight" in whole
        )
        whole[name] = whole[name] + change
    return LocalFile("model", written(path, whole).path, str(path))


# --- strengths ---


SETTINGS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "alpha": ({"lora_alpha": 1}, lambda index: 1 / 4),
    "over the root of the rank": ({"lora_alpha": 1, "use_rslora": True}, lambda index: 1 / 2),
    "for some layers": (
        {"lora_alpha": 4, "alpha_pattern": {"attn2.to_v": 1.0, "^attn1.to_v$": 2.0}},
        lambda index: (2 / 4, 1 / 4)[index % 2],
    ),
    "none": ({"r": 4, "alpha_pattern": {}, "lora_alpha": None}, lambda index: 1.0),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_strength_in_the_metadata_counts(
    engine: DiffusionEngine, plain: Tensors, tmp_path: Path, kind: str
) -> None:
    """Where alpha stands in the metadata alone, as diffusers saves it, each layer works at its strength."""
    said, scale = SETTINGS[kind]
    tensors, changes = {}, {}
    for index, layer in enumerate(layers(plain, "to_v")):
        down, up = factors(plain, layer, index)
        tensors |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
        changes[layer] = up @ down * scale(index)
    settings = json.dumps({f"unet.{name}": value for name, value in said.items()})
    lora = written(tmp_path / "style.safetensors", tensors, lora_adapter_metadata=settings)
    expected = make(engine, merged(tmp_path / "merged.safetensors", plain, changes))
    assert far(make(engine, SAMPLE, lora), expected)[1] <= 2
    assert far(make(engine, SAMPLE), expected)[0] > 1


def test_strength_and_rank_may_differ_by_layer(
    engine: DiffusionEngine, plain: Tensors, tmp_path: Path
) -> None:
    """A LoRA that was resized has another rank and another alpha for each layer, and each counts."""
    tensors, changes = {}, {}
    for index, layer in enumerate(layers(plain, "to_v")):
        rank, alpha = index % 3 + 1, [0.5, 2.0, 4.0, 1.0][index % 4]
        down, up = factors(plain, layer, index, rank)
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        changes[layer] = up @ down * alpha / rank
    expected = make(engine, merged(tmp_path / "merged.safetensors", plain, changes))
    found = make(engine, SAMPLE, written(tmp_path / "style.safetensors", tensors))
    assert far(found, expected)[1] <= 2
    assert far(make(engine, SAMPLE), expected)[0] > 1


TYPES = (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_lora_in_any_numbers_is_what_they_say(
    engine: DiffusionEngine, plain: Tensors, tmp_path: Path, type_: torch.dtype
) -> None:
    """A LoRA that is saved in other numbers than single precision works as the very numbers that they are."""
    tensors, changes = {}, {}
    for index, layer in enumerate(layers(plain, "to_v")):
        down, up = (each.to(type_) for each in factors(plain, layer, index))
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        changes[layer] = up.float() @ down.float()
    expected = make(engine, merged(tmp_path / "merged.safetensors", plain, changes))
    assert far(make(engine, SAMPLE, written(tmp_path / "style.safetensors", tensors)), expected)[1] <= 2
    assert far(make(engine, SAMPLE), expected)[0] > 1


def test_lora_of_a_text_encoder_alone_works(engine: DiffusionEngine, plain: Tensors, tmp_path: Path) -> None:
    """A LoRA in kohya's names of a text encoder's queries and values, and of nothing else, is applied."""
    generator = torch.Generator().manual_seed(5)
    tensors, changes = {}, {}
    for name in plain:
        if name.startswith(READER) and name.endswith(("q_proj.weight", "v_proj.weight")):
            layer = name.removeprefix(READER).removesuffix(".weight")
            out, into = plain[name].shape
            down = torch.randn(4, into, generator=generator) * 0.3
            up = torch.randn(out, 4, generator=generator) * 0.3
            stem = f"lora_te_text_model_{layer.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            changes[layer] = up @ down
    expected = make(engine, merged(tmp_path / "merged.safetensors", plain, changes))
    assert far(make(engine, SAMPLE, written(tmp_path / "style.safetensors", tensors)), expected)[1] <= 2
    assert far(make(engine, SAMPLE), expected)[0] > 1


# --- names of old, and of others ---


def test_attention_processors_of_old_diffusers(
    engine: DiffusionEngine, plain: Tensors, tmp_path: Path
) -> None:
    """A LoRA as diffusers saved it before 0.17, by attention processors, on denoiser and text encoder."""
    generator = torch.Generator().manual_seed(3)
    block, reader = "transformer_blocks.0.attn2.to_v", "encoder.layers.1.self_attn.v_proj"
    stems = {
        f"input_blocks.3.1.{block}": f"down_blocks.1.attentions.0.{block}",
        reader: f"text_encoder.text_model.{reader}".replace("v_proj", "to_v"),
    }
    tensors, changes = {}, {}
    for (layer, stem), prefix in zip(stems.items(), (DENOISER, READER), strict=True):
        out, into = plain[f"{prefix}{layer}.weight"].shape
        down, up = (
            torch.randn(4, into, generator=generator) * 0.4,
            torch.randn(out, 4, generator=generator) * 0.4,
        )
        owner, _, last = stem.rpartition(".")
        processor = f"{owner}.processor" if prefix == DENOISER else owner
        tensors |= {f"{processor}.{last}_lora.down.weight": down, f"{processor}.{last}_lora.up.weight": up}
        changes[layer] = up @ down
    expected = make(engine, merged(tmp_path / "merged.safetensors", plain, changes))
    found = make(engine, SAMPLE, written(tmp_path / "old.safetensors", tensors))
    assert far(found, expected)[1] <= 2
    assert far(make(engine, SAMPLE), expected)[0] > 1


def test_names_of_x_labs(flux: Tiny, tmp_path: Path) -> None:
    """XLabs' LoRAs of FLUX.1 are on the attention of both streams, and on parts of the single blocks."""
    published = dict(flux.published["transformer"].tensors)
    width = published["double_blocks.0.img_attn.proj.weight"].shape[0]
    rows = {
        "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 3 * width),
        "double_blocks.0.processor.proj_lora2": ("double_blocks.0.txt_attn.proj", width),
        "single_blocks.0.processor.qkv_lora": ("single_blocks.0.linear1", 3 * width),
        "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", width),
    }
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for stem, (layer, count) in rows.items():
        weight = published[f"{layer}.weight"].clone()
        down = torch.randn(4, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
        up = torch.randn(count, 4, generator=generator)
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        weight[:count] += up @ down
        published[f"{layer}.weight"] = weight
    engine = DiffusionEngine("cpu", families=[flux.family])
    others = [flux.file(part) for part in ("text_encoder", "text_encoder_2", "vae")]
    denoiser = written(tmp_path / "merged.safetensors", published)._replace(role="diffusion-model")
    expected = make(engine, denoiser, *others)
    found = make(engine, *flux.files(), written(tmp_path / "style.safetensors", tensors))
    assert far(found, expected)[1] <= 2
    assert far(make(engine, *flux.files()), expected)[0] > 1


# --- what has no place ---


def kohya(plain: Tensors, layers: list[str]) -> Tensors:
    tensors = {}
    for layer in layers:
        down, up = factors(plain, layer)
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    return tensors


def test_what_has_no_place_is_told(
    engine: DiffusionEngine, plain: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An embedding that OneTrainer bundles, and layers that this model lacks, are left out, which the log and
    generationMeta say; the rest works as without them.
    """
    tensors = kohya(plain, layers(plain, "to_v"))
    alone = make(engine, SAMPLE, written(tmp_path / "style.safetensors", tensors))
    assert "lorasLeftOut" not in alone.meta
    more = {"bundle_emb.hero.clip_l": torch.ones(2, 96)}
    more |= {f"lora_unet_nowhere.lora_{end}.weight": torch.ones(4, 4) for end in ("down", "up")}
    found = make(engine, SAMPLE, written(tmp_path / "more.safetensors", tensors | more))
    assert far(found, alone)[1] == 0
    told = found.meta["lorasLeftOut"]["more"]
    assert told == {"layers": 2, "of": 10, "first": "bundle_emb.hero.clip_l"}
    (record,) = [each for each in caplog.records if "LoRA" in each.message]
    assert (record.levelname, record.left_out) == ("WARNING", 2)  # type: ignore[attr-defined]


def test_layer_that_sees_less_is_left_out(tmp_path: Path) -> None:
    """On an inpainting model, whose first layer sees the mask too, the rest of a LoRA for its base works."""
    tiny = tiny_model("flux1-fill", tmp_path, 32)
    rows, sees = tiny.published["transformer"].tensors["img_in.weight"].shape
    factors = {"lora_A": torch.ones(4, sees // 2), "lora_B": torch.ones(rows, 4)}
    first = {f"transformer.x_embedder.{end}.weight": each for end, each in factors.items()}
    lora = written(tmp_path / "style.safetensors", first | load_file(tiny.lora().path))
    engine = DiffusionEngine("cpu", families=[tiny.family])
    inputs = Inputs(encoded(scene()), mask=encoded(scene()))
    found = make(engine, *tiny.files(), lora, inputs=inputs)
    assert found.meta["lorasLeftOut"]["style"]["first"] == "transformer.x_embedder"
    assert far(found, make(engine, *tiny.files(), tiny.lora(), inputs=inputs))[1] == 0


STEM = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_v"


def small(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape)


def wrong(plain: Tensors) -> dict[str, tuple[Tensors, str]]:
    """Files that are refused, and what is said of them."""
    down, up = factors(plain, "input_blocks.3.1.transformer_blocks.0.attn1.to_v")
    good = {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up}
    square = torch.ones(4, 4)
    nowhere = {f"lora_unet_{n}.lora_{end}.weight": square for n in ("x", "y") for end in ("down", "up")}
    wide = torch.cat([down, down], dim=1)
    return {
        "not a number": (good | {f"{STEM}.lora_up.weight": up * torch.nan}, "not finite"),
        "infinite alpha": (good | {f"{STEM}.alpha": torch.tensor(torch.inf)}, "not finite"),
        "a control LoRA": (good | {f"{STEM}.lora_down.weight": wide}, "control LoRA"),
        "of another size": (good | {f"{STEM}.lora_up.weight": up[:-1]}, "size mismatch"),
        "without its other half": ({f"{STEM}.lora_down.weight": down}, "lacks up"),
        "factors of two ranks": (good | {f"{STEM}.lora_up.weight": up[:, :2]}, "do not go together"),
        "factors of no rank": (
            good | {f"{STEM}.lora_up.weight": up[:, :0], f"{STEM}.lora_down.weight": down[:0]},
            "do not go together",
        ),
        "vectors": (
            {f"{STEM}.lora_down.weight": down[0], f"{STEM}.lora_up.weight": up[0]},
            "do not go together",
        ),
        "mostly of another model": (good | nowhere, "not for sample: 2 of the 3 layers"),
        "of a kind that is not read": ({f"{STEM}.oft_blocks": small((4, 8, 8))}, "OFT"),
        "a control network": ({"lora_controlnet": small((1,))}, "control LoRA"),
        "a checkpoint": (dict(list(plain.items())[:20]), "is none"),
    }


WRONG = list(wrong({f"{DENOISER}input_blocks.3.1.transformer_blocks.0.attn1.to_v.weight": torch.ones(2, 2)}))


@pytest.mark.parametrize("kind", WRONG)
def test_file_that_is_refused(engine: DiffusionEngine, plain: Tensors, tmp_path: Path, kind: str) -> None:
    """A LoRA that cannot be applied fails the job by name, with what is wrong, before a model is loaded."""
    tensors, says = wrong(plain)[kind]
    with pytest.raises(JobError, match=rf"LoRA broken\.safetensors .*{says}") as caught:
        make(engine, SAMPLE, written(tmp_path / "broken.safetensors", tensors))
    assert caught.value.is_final_here
    assert not engine.resident()


def test_odd_metadata_change_nothing(engine: DiffusionEngine, plain: Tensors, tmp_path: Path) -> None:
    """A LoRA works, at the strength that it says, where its metadata hold numbers and lists too."""
    tensors = {}
    for index, layer in enumerate(layers(plain, "to_v")):
        down, up = factors(plain, layer, index)
        tensors |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1})}
    lora = written(tmp_path / "style.safetensors", tensors, **said)
    odd = with_metadata(tmp_path / "odd.safetensors", tensors, said | {"epoch": 5, "tags": ["a"]})
    assert make(engine, SAMPLE, odd._replace(role="lora")).data == make(engine, SAMPLE, lora).data


def test_metadata_that_cannot_be_read_is_refused(
    engine: DiffusionEngine, plain: Tensors, tmp_path: Path
) -> None:
    """Settings that are no JSON say nothing of the strength, so that the file is refused."""
    tensors = kohya(plain, layers(plain, "to_v"))
    for text in ("{", "[]", '{"unet.lora_alpha": "much"}'):
        path = tmp_path / f"style{len(text)}.safetensors"
        with pytest.raises(JobError, match="metadata"):
            make(engine, SAMPLE, written(path, tensors, lora_adapter_metadata=text))


def test_disk_that_does_not_give_a_lora_is_no_damage(
    engine: DiffusionEngine, plain: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails while a LoRA is read does not blame the file, which another worker may well read."""

    @contextlib.contextmanager
    def failing(path: Path, device: str) -> Iterator[Any]:
        raise OSError(errno.EIO, "Input/output error")
        yield

    style = written(tmp_path / "style.safetensors", kohya(plain, layers(plain, "attn1.to_q")[:1]))
    make(engine, SAMPLE)
    monkeypatch.setattr("studio_worker.engine.loras.adapters.open_safetensors", failing)
    with pytest.raises(JobError, match=r"style\.safetensors cannot be read: Input/output error") as caught:
        make(engine, SAMPLE, style)
    assert not isinstance(caught.value, FileDamaged)
    assert not caught.value.is_jobs_fault


def test_lora_that_was_exchanged_is_read_anew(
    engine: DiffusionEngine, plain: Tensors, tmp_path: Path
) -> None:
    """A file without a known hash may be another one for the next job: it is that job's."""
    one, other = layers(plain, "attn1.to_q")[:1], layers(plain, "attn1.to_v")
    expected = make(engine, SAMPLE, written(tmp_path / "other.safetensors", kohya(plain, other)))
    style = LocalFile("lora", tmp_path / "style.safetensors", "the address")
    first = make(engine, SAMPLE, style._replace(path=written(style.path, kohya(plain, one)).path))
    make(engine, SAMPLE)
    written(style.path, kohya(plain, other))
    assert make(engine, SAMPLE, style).data == expected.data != first.data
