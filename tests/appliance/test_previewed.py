"""Offers of models that are not here yet, judged by the headers of their files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from studio_worker.box.device import Device
from studio_worker.studio.session.offers import Judgement, Refuse, Take, judge
from tests.fakes.servers import FileServer, ServedFile
from tests.lab.abilities import abilities_of
from tests.lab.frames import claim
from tests.lab.headers import IQ2_XXS, hollow_gguf, hollow_safetensors, parts_of, whole

CARD = Device("cuda:0", "NVIDIA L4", 24.0, (8, 9))
SMALL_CARD = Device("cuda:0", "a small card", 0.2, (8, 9))
Q4_K = 12
FOREIGN = {f"towers.{number}.weight": (10_240, 10_240) for number in range(100)}
PREFIXES = {"diffusion-model": "unet.", "text-encoder": "text_encoder.", "text-encoder.1": "text_encoder_2."}
PICKLE = b"PK\x03\x04" + b"archive/data.pkl" * 1000


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With RAM and disk for every model."""
    monkeypatch.setattr("studio_worker.engine.rendering.estimate.total_ram_bytes", lambda: 10**12)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**13))


def served(server: FileServer, files: Mapping[str, bytes], **faults: Any) -> list[ServedFile]:
    return [server.serve(f"/{name}", content, **faults) for name, content in files.items()]


def judged(folder: Path, device: Device, files: list[ServedFile]) -> Judgement:
    entries = []
    for file in files:
        name = file.url.rpartition("/")[2]
        entries.append({"role": name.partition(".")[0], "url": file.url, "filename": name})
    _, situation = abilities_of(folder, device)
    source = {"engine": "sd-cpp", "files": entries, "cliDefaults": {}}
    return judge(claim(modelSource=source, vramGbEstimate=0.1), situation)


def checkpoint() -> dict[str, bytes]:
    """SDXL as one file."""
    shapes = {
        PREFIXES.get(part, "vae.") + name: shape
        for part, found in parts_of("sdxl").items()
        for name, shape in found.items()
    }
    return {"model.safetensors": hollow_safetensors(shapes, "F16")}


def sharded() -> dict[str, bytes]:
    """FLUX.1 whose denoiser comes in three files."""
    names, shapes = list(parts_of("flux1-dev")["diffusion-model"]), parts_of("flux1-dev")["diffusion-model"]
    shards = {
        f"diffusion-model.t-0000{n + 1}-of-00003.safetensors": hollow_safetensors(
            {name: shapes[name] for name in names[n::3]}
        )
        for n in range(3)
    }
    files: dict[str, bytes] = {**whole("flux1-dev"), **shards}
    del files["diffusion-model"]
    return files


def quantised() -> dict[str, bytes]:
    """FLUX.1 whose denoiser is a GGUF file."""
    shapes = parts_of("flux1-dev")["diffusion-model"]
    return {**whole("flux1-dev"), "diffusion-model": hollow_gguf(shapes, Q4_K)}


FORMS: dict[str, Callable[[], Mapping[str, bytes]]] = {
    "one checkpoint": checkpoint,
    "a file a component": lambda: whole("flux1-dev"),
    "shards": sharded,
    "gguf": quantised,
}


@pytest.mark.parametrize("form", FORMS)
def test_real_need_of_memory_decides_for_every_form_of_a_model(
    form: str, tmp_path: Path, server: FileServer
) -> None:
    """In whichever files a model is published, a card that can hold it takes the job, and one that cannot
    leaves it to others, with what it would need; whatever the studio's own estimate says.
    """
    files = served(server, FORMS[form]())
    assert isinstance(judged(tmp_path, CARD, files), Take)
    refused = judged(tmp_path, SMALL_CARD, files)
    assert isinstance(refused, Refuse)
    assert refused.code is None
    assert "GB of memory and 0.2 GB are free here" in refused.reason


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"diffusion-model": hollow_safetensors(FOREIGN)}, "is of no known model family"),
        ({"model.ckpt": PICKLE}, "is a zip archive"),
        ({"model.bin": b"\x80\x02" + b"pickled" * 1000}, "is a Python pickle"),
        (
            {"diffusion-model": hollow_gguf(FOREIGN, 99)},
            "has weights of a quantisation that this worker does",
        ),
    ],
    ids=["family", "zip", "pickle", "quantisation"],
)
def test_what_is_not_served_is_left_to_others_by_name(
    files: Mapping[str, bytes], reason: str, tmp_path: Path, server: FileServer
) -> None:
    """The reason is the one that whole files would be refused with."""
    refused = judged(tmp_path, CARD, served(server, files))
    assert isinstance(refused, Refuse)
    assert refused.code is None
    assert reason in refused.reason


def test_quantisation_that_cannot_be_computed_with_is_left_to_others(
    tmp_path: Path, server: FileServer
) -> None:
    """Types that the format has and no arithmetic here are named before 10 GB of them are fetched."""
    shapes = parts_of("flux1-dev")["diffusion-model"]
    files = {**whole("flux1-dev"), "diffusion-model": hollow_gguf(shapes, IQ2_XXS)}
    refused = judged(tmp_path, CARD, served(server, files))
    assert isinstance(refused, Refuse)
    assert "has weights of type IQ2_XXS, which is not served" in refused.reason


def test_model_whose_files_have_no_room_is_left_to_others(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How large its files are the servers say, where the studio does not."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**10))
    refused = judged(tmp_path, CARD, served(server, whole("flux1-dev")))
    assert isinstance(refused, Refuse)
    assert refused.code is None
    assert "GB too little room for this model" in refused.reason


@pytest.mark.parametrize(
    "faults",
    [
        {"ranges": False},
        {"ranges": False, "no_length": True},
        {"answers": [(503, {})]},
        {"answers": [(404, {})]},
        {"range_shift": 8},
        {"drop_after": 1000},
    ],
    ids=["no ranges", "no length", "busy", "gone", "another range", "a broken body"],
)
def test_server_that_shows_no_header_is_judged_by_its_download(
    faults: dict[str, Any], tmp_path: Path, server: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The job is taken as if nobody had asked, and the log says why it was not judged by its headers."""
    caplog.set_level(logging.INFO)
    files = served(server, {"diffusion-model": hollow_safetensors(FOREIGN)}, **faults)
    assert isinstance(judged(tmp_path, CARD, files), Take)
    assert "offer judged without its headers" in caplog.messages
    assert len(files[0].requests) == 1


def test_page_in_the_place_of_a_model_is_judged_by_its_download(tmp_path: Path, server: FileServer) -> None:
    """What a portal or a login puts there says nothing of the model."""
    files = served(server, {"model.safetensors": b"<!doctype html><html>please sign in</html>" * 100})
    assert isinstance(judged(tmp_path, CARD, files), Take)
