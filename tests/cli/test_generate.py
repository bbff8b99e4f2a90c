"""`studio-worker generate`: a picture without a studio."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from studio_worker import sample_model
from studio_worker.cli import app
from studio_worker.errors import StudioWorkerError
from tests.fakes.servers import FileServer
from tests.lab.engine import encoded, scene
from tests.lab.removal_graphs import pull_push, removal_graph

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PROMPT = sample_model.prompt("red", "potion", "grass")


def generate(tmp_path: Path, *words: str, prompt: str = PROMPT) -> Result:
    """One call with a folder without configuration, 2 steps and seed 7 where the words say nothing else."""
    usual = ["--config", str(tmp_path), "--output", str(tmp_path / "out.png"), "--steps", "2", "--seed", "7"]
    return CliRunner().invoke(app, ["generate", prompt, *usual, *words])


def failure(result: Result) -> str:
    """What an operator reads of a failed call."""
    assert result.exit_code != 0
    match result.exception:
        case StudioWorkerError():
            return str(result.exception)
        case OSError(filename=name, strerror=reason):
            return f"{name}: {reason}"
    return result.output


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), int)


def configured(tmp_path: Path, model: dict[str, object]) -> None:
    """A configuration folder with one required model."""
    (tmp_path / "config.toml").write_text(
        f'[worker]\ndevice = "cpu"\n[models]\nroot = "{tmp_path}/models"\n[state]\ndir = "{tmp_path}/state"\n'
    )
    (tmp_path / "models.d").mkdir()
    (tmp_path / "models.d" / "m.json").write_text(json.dumps(model))


def test_picture_is_made_without_any_configuration(tmp_path: Path) -> None:
    """On a bare machine the embedded model makes a picture; the same seed makes the same one."""
    result = generate(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert (facts["seed"], facts["steps"], facts["width"], facts["model"]) == (7, 2, 64, "sample-model")
    first = (tmp_path / "out.png").read_bytes()
    assert len(first) == facts["bytes"]
    assert generate(tmp_path).output.endswith("out.png: 64x64, seed 7\n")
    assert (tmp_path / "out.png").read_bytes() == first


def test_rounded_size_is_said(tmp_path: Path) -> None:
    """Where the model rounds the size, the line about the picture has both."""
    said = "out.png: 128x128 (asked for 66x70), seed 7\n"
    assert generate(tmp_path, "--size", "66x70", "--steps", "1").output.endswith(said)


def test_every_option_reaches_the_picture(tmp_path: Path) -> None:
    """Size, sampler, guidance, negative prompt and exactly 20 steps are what was asked for."""
    words = [
        "--size",
        "128x64",
        "--sampler",
        "euler",
        "--cfg",
        "2.5",
        "--negative",
        "blurry",
        "--steps",
        "20",
        "--json",
    ]
    facts = json.loads(generate(tmp_path, *words).output)
    asked = {"width": 128, "height": 64, "sampler": "euler", "guidance": 2.5, "steps": 20}
    assert asked.items() <= facts.items()


def test_picture_changes_within_the_mask_alone(tmp_path: Path) -> None:
    """--init and --mask change what is white in the mask and keep the rest."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    (tmp_path / "init.png").write_bytes(encoded(scene()))
    (tmp_path / "mask.png").write_bytes(encoded(mask))
    result = generate(
        tmp_path, "--init", f"{tmp_path}/init.png", "--mask", f"{tmp_path}/mask.png", "--denoise", "1"
    )
    assert result.exit_code == 0, result.output
    changed = (pixels(tmp_path / "out.png") != np.asarray(scene(), int)).any(axis=2)
    inside = np.asarray(mask) > 0
    assert changed[inside].any()
    assert not changed[~inside].any()


def test_required_model_is_fetched_and_used(tmp_path: Path) -> None:
    """A model of models.d is found by its id, downloaded where it is missing, and kept."""
    generate(tmp_path, "-o", str(tmp_path / "expected.png"))
    with FileServer() as server:
        file = server.serve("/m.safetensors", sample_model.WEIGHTS.read_bytes())
        files = [{"role": "model", "url": file.url, "filename": "m.safetensors", "sha256": file.sha256}]
        configured(
            tmp_path, {"id": "m", "engine": "sd-cpp", "files": files, "cliDefaults": sample_model.DEFAULTS}
        )
        assert generate(tmp_path, "-m", "m").exit_code == 0
        assert generate(tmp_path, "-m", f"{tmp_path}/models.d/m.json").exit_code == 0
    assert len(file.requests) == 1
    assert (pixels(tmp_path / "out.png") == pixels(tmp_path / "expected.png")).all()


def test_weights_file_is_a_model(tmp_path: Path) -> None:
    """A checkpoint on disk can be tried out before it is registered anywhere."""
    words = ("--size", "64", "--cfg", "4", "--device", "cpu")
    assert generate(tmp_path, "-m", str(sample_model.WEIGHTS), *words).exit_code == 0
    assert pixels(tmp_path / "out.png").shape == (64, 64, 3)


def test_object_is_removed_without_a_studio(tmp_path: Path) -> None:
    """A graph file, a picture and a mask make the picture without what is white in the mask."""
    graph = removal_graph(tmp_path / "lama.onnx", pull_push)
    clean = Image.new("RGB", (90, 70), (10, 120, 200))
    picture, mask = clean.copy(), Image.new("L", clean.size)
    picture.paste((255, 0, 0), (30, 30, 50, 50))
    mask.paste(255, (30, 30, 50, 50))
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    words = ["--model", str(graph.path), "--init", str(tmp_path / "picture.png")]
    result = generate(tmp_path, *words, "--mask", str(tmp_path / "mask.png"), "--device", "cpu", prompt="")
    assert result.exit_code == 0, failure(result)
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(clean, int))


def test_picture_can_go_to_stdout(tmp_path: Path) -> None:
    """-o - writes the picture, and nothing else, to stdout."""
    assert Image.open(io.BytesIO(generate(tmp_path, "-o", "-").stdout_bytes)).size == (64, 64)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-o", "out.tga"), "unknown ext 'tga'; this worker writes"),
        (("-o", "nowhere/out.png"), "nowhere is not there"),
        (("--size", "20000"), "16 to 4096 pixels"),
        (("--size", "large"), "write e.g. 1024x768"),
        (("--size", "64x"), "write e.g. 1024x768"),
        (("--size", "-64x64"), "write e.g. 1024x768"),
        (("--sampler", "magic"), "unknown samplingMethod 'magic'; known: euler"),
        (("--mask", "mask.png"), "there is no picture to change"),
        (("--device", "gpu"), "use auto, cuda, cuda:N or cpu"),
        (("-m", "nosuch"), "config.toml: no such file"),
        (("--lora", "x.safetensors:much"), "x.safetensors:much: No such file"),
        (("--lora", "mask.png:0.5", "--lora", "./mask.png"), "two LoRAs are called mask; rename one of them"),
        (("--init", "nosuch.png"), "nosuch.png: No such file"),
    ],
)
def test_mistake_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    """What is asked wrongly is said in a sentence that names the cure, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.png").write_bytes(encoded(Image.new("L", (64, 64), 255)))
    assert says in " ".join(failure(generate(tmp_path, *words)).replace("│", "").split())
    assert {path.name for path in tmp_path.iterdir()} == {"mask.png"}


def test_fault_of_a_models_file_is_said_in_an_operators_words(tmp_path: Path) -> None:
    """What is wrong in a file given by --model is said as of one in models.d, not as the library says it."""
    configured(tmp_path, {"id": "m", "engine": "synthetic", "files": []})
    (tmp_path / "own.json").write_text('{"engine": "sd-cpp", "files": 3, "cliDefaults": {}}')
    told = failure(generate(tmp_path, "-m", f"{tmp_path}/own.json"))
    assert "own.json: files: must be a list, [ ... ]; write engine, files" in told


def test_unknown_model_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    """An id that is in no file of models.d is refused with the ids that are."""
    file = {"role": "model", "url": "https://x/m", "filename": "m", "sha256": "0" * 64}
    configured(tmp_path, {"id": "m", "engine": "sd-cpp", "files": [file]})
    assert "known: m, sample-model" in failure(generate(tmp_path, "-m", "nosuch"))
