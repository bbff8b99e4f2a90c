"""Finished pictures: formats and the parameters they carry."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from studio_worker import __version__
from studio_worker.engine.parameters import Parameters, printable
from studio_worker.engine.pictures.encoding import (
    Unencoded,
    check_ext,
    encode,
    generation_meta,
    parameters_text,
)
from studio_worker.errors import JobError
from tests.lab.engine import scene

PARAMETERS = Parameters(
    prompt="a red potion, “glühend”",
    negative_prompt="blurry",
    width=64,
    height=64,
    steps=12,
    guidance=4.5,
    sampler="euler_a",
    seed=42,
    denoise=None,
    ext="png",
    asked_size=(64, 64),
)
FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG", "jpeg": "JPEG"}


def carried(data: bytes) -> str:
    """The parameters that a picture carries, as a viewer reads them."""
    picture = Image.open(io.BytesIO(data))
    if "parameters" in picture.info:
        return str(picture.info["parameters"])
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    return str(comment[8:].decode("utf-16-be"))


@pytest.mark.parametrize(("ext", "format_"), FORMATS.items())
def test_picture_carries_its_parameters(ext: str, format_: str) -> None:
    """Every format is what its extension says, and tells prompt, seed, steps, sampler, guidance, size,
    model.
    """
    data = encode(scene(), replace(PARAMETERS, ext=ext), "potions-v1")
    assert Image.open(io.BytesIO(data)).format == format_
    text = carried(data)
    assert text.splitlines() == [
        PARAMETERS.prompt,
        "Negative prompt: blurry",
        "Steps: 12, Sampler: euler_a, CFG scale: 4.5, Seed: 42, Size: 64x64, Model: potions-v1, "
        f"Version: studio-worker {__version__}",
    ]


@pytest.mark.parametrize("ext", FORMATS)
def test_same_picture_same_bytes(ext: str) -> None:
    """The same picture with the same parameters gives the same file, at any time."""
    parameters = replace(PARAMETERS, ext=ext)
    assert encode(scene(), parameters, "m") == encode(scene(), parameters, "m")


def test_png_is_lossless() -> None:
    """A png holds the very pixels that were made."""
    data = encode(scene(), PARAMETERS, "m")
    assert Image.open(io.BytesIO(data)).tobytes() == scene().tobytes()


@pytest.mark.parametrize("ext", ["gif", "PNG", "", "exe", "../png"])
def test_unknown_ext_is_refused(ext: str) -> None:
    """An extension that is not written here is an error that names those that are."""
    with pytest.raises(JobError, match="webp, png, jpg") as caught:
        check_ext(ext)
    assert not caught.value.retryable


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=60), model=st.text(max_size=20), ext=st.sampled_from(sorted(FORMATS)))
def test_any_prompt_survives(prompt: str, model: str, ext: str) -> None:
    """A prompt in any script comes back from the file as it went in, whatever the model is called."""
    parameters = replace(PARAMETERS, prompt=printable(prompt), ext=ext)
    assert carried(encode(scene(16, 16), parameters, model)) == parameters_text(parameters, model)


@pytest.mark.parametrize("ext", FORMATS)
def test_huge_prompt_keeps_the_settings(ext: str) -> None:
    """A prompt too long for a format's metadata is cut there; the picture and its settings are not lost."""
    parameters = replace(PARAMETERS, prompt="🐉 " * 60_000, ext=ext)
    text = carried(encode(scene(), parameters, "m"))
    assert "Seed: 42" in text.splitlines()[-1]


def test_model_name_cannot_pose_as_settings() -> None:
    """A model name with commas is quoted, so that a reader does not take it for settings."""
    assert 'Model: "a, Seed: 1"' in parameters_text(PARAMETERS, "a, Seed: 1")


def test_generation_meta_names_everything() -> None:
    """generationMeta has seed, steps, sampler, guidance, size, model, worker version and times."""
    meta = generation_meta(
        replace(PARAMETERS, denoise=0.5),
        model="m",
        engine="sd-cpp",
        family="sd1",
        timings_s={"load": 0.0, "generate": 1.23456, "encode": 0.01},
        device="cpu",
    )
    assert meta == {
        "seed": 42,
        "steps": 12,
        "sampler": "euler_a",
        "guidance": 4.5,
        "width": 64,
        "height": 64,
        "model": "m",
        "workerVersion": __version__,
        "engine": "sd-cpp",
        "family": "sd1",
        "times": {"load": 0.0, "generate": 1.2346, "encode": 0.01},
        "denoise": 0.5,
        "device": "cpu",
    }


def test_generation_meta_tells_a_rounded_size() -> None:
    """Where the family rounds the size that was asked for, generationMeta has both."""
    rounded = replace(PARAMETERS, asked_size=(60, 64))
    meta = generation_meta(rounded, model="m", engine="sd-cpp", family="z", timings_s={})
    assert (meta["width"], meta["askedWidth"], meta["askedHeight"]) == (64, 60, 64)


def unencoded(picture: Image.Image, ext: str) -> Unencoded:
    return Unencoded(picture, replace(PARAMETERS, ext=ext), "m", "sd-cpp", "sd1", {"load": 1.0})


def test_picture_that_its_format_cannot_hold_is_told_without_the_prompt() -> None:
    """WebP ends at 16,383 pixels a side: the job fails with a reason, another worker may try it, and no
    prompt is in what is told.
    """
    with pytest.raises(JobError, match="could not be made: ValueError") as caught:
        unencoded(Image.new("RGB", (17_000, 1)), "webp").encoded()
    assert not caught.value.is_jobs_fault
    assert caught.value.__cause__ is None


def test_memory_that_runs_out_while_a_picture_is_encoded_may_be_there_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture that RAM had no room to encode fails with that reason, and the job goes back."""

    def full(*given: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(JobError, match="out of memory") as caught:
        unencoded(scene(), "png").encoded()
    assert not caught.value.is_jobs_fault


def test_encoded_picture_says_how_long_that_took() -> None:
    """The time to encode stands beside the other stages, in the metadata too."""
    made = unencoded(scene(), "png").encoded()
    assert set(made.timings_s) == set(made.meta["times"]) == {"load", "encode"}
    assert made.data == encode(scene(), PARAMETERS, "m")
