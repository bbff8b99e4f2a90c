"""Placeholder pictures."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from studio_worker.engine import Router, default_router
from studio_worker.engine.synthetic import SyntheticEngine
from studio_worker.errors import JobCancelled, JobError
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, ModelSource
from tests.lab.engine import request


def ignore(_done: int, _total: int) -> None:
    """A progress callback for tests of something else."""


def make(**task: object) -> tuple[bytes, dict[str, object]]:
    picture = SyntheticEngine().generate(request(files=(), defaults=CliDefaults(), **task), ignore, Cancel())
    return picture.data, dict(picture.meta)


@pytest.mark.parametrize(("ext", "format_"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_placeholder_honours_size_and_ext(ext: str, format_: str) -> None:
    """A placeholder has the size, to the pixel, and the format that were asked for."""
    data, meta = make(width=101, height=67, ext=ext)
    picture = Image.open(io.BytesIO(data))
    assert (picture.size, picture.format) == ((101, 67), format_)
    assert (meta["width"], meta["height"], meta["engine"]) == (101, 67, "synthetic")


def test_placeholder_is_a_picture() -> None:
    """A placeholder is drawn: it has many colours, and is never one plain surface."""
    data, _ = make(width=256, height=256)
    assert len(np.unique(np.asarray(Image.open(io.BytesIO(data))).reshape(-1, 3), axis=0)) > 500


def test_placeholder_follows_seed_and_prompt() -> None:
    """The same seed and prompt give the same bytes; another of either gives another picture."""
    first, meta = make(seed=1, width=64, height=64)
    assert meta["seed"] == 1
    assert make(seed=1, width=64, height=64)[0] == first
    assert make(seed=2, width=64, height=64)[0] != first
    assert make(seed=1, width=64, height=64, prompt="another")[0] != first


def test_placeholder_reports_progress_and_stops() -> None:
    """A placeholder counts its steps, and stops at the step where it is asked to."""
    seen: list[tuple[int, int]] = []
    cancel = Cancel()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            cancel.set("enough")

    with pytest.raises(JobCancelled, match="enough"):
        SyntheticEngine().generate(request(files=(), steps=7), progress, cancel)
    assert seen == [(1, 7), (2, 7), (3, 7)]


def test_placeholder_refuses_bad_parameters() -> None:
    """A placeholder has the same limits as a picture."""
    with pytest.raises(JobError, match="100000 px"):
        make(width=100_000)
    with pytest.raises(JobError, match="unknown ext"):
        make(ext="bmp")


def test_placeholders_need_no_torch() -> None:
    """Choosing engines and drawing placeholders never imports torch, which the way to READY must not pay
    for.
    """
    code = (
        "import sys, studio_worker.engine as e\n"
        "from studio_worker.models import ModelSource\n"
        "e.default_router('cpu').for_source(ModelSource(engine='synthetic'))\n"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_placeholders_are_only_for_sources_that_say_so() -> None:
    """A source of another engine never gets a placeholder, and an unknown one is refused by name."""
    router: Router = default_router("cpu")
    assert isinstance(router.for_source(ModelSource(engine="synthetic")), SyntheticEngine)
    assert not isinstance(router.for_source(ModelSource(engine="sd-cpp")), SyntheticEngine)
    with pytest.raises(JobError, match="unknown engine 'parakeet'"):
        router.for_source(ModelSource(engine="parakeet"))
