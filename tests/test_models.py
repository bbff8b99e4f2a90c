"""What a model is made of, and which names and addresses are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from studio_worker.models import CliDefaults, ModelFile, ModelSource, RequiredModel

SHA = "0123456789abcdef" * 4
FILE = TypeAdapter(ModelFile)


def entry(**changes: Any) -> dict[str, Any]:
    return {"role": "model", "url": "https://m.example/a", "filename": "a.safetensors"} | changes


# --- files ---


@given(st.text("./\\\0ab \n\t\x7fé", max_size=12) | st.text(max_size=12))
def test_model_file_name_stays_in_its_folder(name: str) -> None:
    """Whatever name a registry gives, the file is either refused or lies directly in its own folder."""
    try:
        file = FILE.validate_python(entry(filename=name))
    except ValidationError:
        return
    folder = Path("/models/content")
    target = Path(os.path.normpath(folder / file.filename))
    assert target.parent == folder
    assert file.filename == name
    assert len(name.splitlines()) == 1


@given(st.text("abc.-_ é", min_size=1, max_size=20))
def test_model_file_takes_every_ordinary_name(name: str) -> None:
    """Ordinary names, with dots, blanks and accents, are taken as they are."""
    assume(name not in {".", ".."})
    assert FILE.validate_python(entry(filename=name)).filename == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/b",
        "/etc/passwd",
        "..\\a",
        "C:\\a",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "a\x7f",
        "a\x85b",
        "a\u2028b",
        "é" * 128,
    ],
)
def test_model_file_refuses_names_that_are_none(name: str) -> None:
    """Names that lead out of the folder, hold control characters or are too long are refused."""
    with pytest.raises(ValidationError, match=r"plain file name|at most 255 bytes"):
        FILE.validate_python(entry(filename=name))


def test_model_file_takes_a_hash_in_either_case() -> None:
    """A hash may be written in upper case; it is kept in lower case, so that equal files are equal."""
    assert FILE.validate_python(entry(sha256=SHA.upper())) == FILE.validate_python(entry(sha256=SHA))


@pytest.mark.parametrize("value", ["", SHA[:-1], SHA + "0", SHA[:-1] + "g", SHA + "\n", "sha256:" + SHA])
def test_model_file_refuses_what_is_no_hash(value: str) -> None:
    """A hash is 64 hexadecimal digits and nothing else."""
    with pytest.raises(ValidationError, match="64 hexadecimal digits"):
        FILE.validate_python(entry(sha256=value))


def test_model_file_refuses_an_unknown_role() -> None:
    """A role that no engine knows is refused when it is read, not when the job runs."""
    with pytest.raises(ValidationError, match="role"):
        FILE.validate_python(entry(role="unet"))


# --- sources ---


def test_source_reads_a_registry_entry() -> None:
    """A studio's registry entry, camelCase and with fields we do not know, is read as it is."""
    required = RequiredModel.model_validate(
        {
            "id": "flux",
            "displayName": "Flux",
            "vramGbEstimate": 12.5,
            "engine": "diffusion",
            "files": [entry(approxBytes=7, sha256=SHA, license="x")],
            "cliDefaults": {"cfgScale": 3.5, "samplingMethod": "euler", "flowShift": 1.1, "unknown": 1},
        }
    )
    assert (required.id, required.kind, required.vram_gb_estimate) == ("flux", "image", 12.5)
    assert required.files == (ModelFile("model", "https://m.example/a", "a.safetensors", 7, SHA),)
    assert required.cli_defaults == CliDefaults(cfg_scale=3.5, sampling_method="euler", flow_shift=1.1)


def test_source_is_written_as_it_was_read() -> None:
    """A source written for the wire has the wire's names and reads back as the same source."""
    source = ModelSource(engine="diffusion", files=(ModelFile("vae", "https://m.example/v", "v", 3, SHA),))
    written = source.model_dump(mode="json", by_alias=True)
    assert written["files"][0]["approxBytes"] == 3
    assert set(written) == {"engine", "files", "cliDefaults"}
    assert ModelSource.model_validate(written) == source


def test_source_cannot_be_changed() -> None:
    """A source that was judged stays what it was."""
    source = ModelSource(engine="diffusion")
    with pytest.raises(ValidationError, match="frozen"):
        source.engine = "synthetic"
