"""The measurements for a GPU, run where there is none: nothing in them is seen for the first time there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from studio_worker.engine.families import identify
from studio_worker.engine.families.family import Family
from studio_worker.engine.families.stable_diffusion import SAMPLE
from studio_worker.models import LocalFile
from tests import bench_gpu
from tests.engine_lab import refuse_network, write_header

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_network(monkeypatch)


@pytest.mark.parametrize("family", [case.family for case in bench_gpu.CASES], ids=lambda family: family.name)
def test_random_files_are_of_the_family(family: Family, tmp_path: Path) -> None:
    """Files with the names and shapes that are written for a bench are taken for the full-size model."""
    files = []
    for name, part in family.parts.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in bench_gpu.published(part).items()}
        files.append(LocalFile(part.role, write_header(tmp_path / name, shapes), name))
    blueprint = identify(files)
    assert blueprint.family.name == family.name
    assert blueprint.sections.keys() == family.parts.keys()


def test_bench_makes_the_plain_pipelines_pictures(tmp_path: Path) -> None:
    """Both sides of the comparison make the same pictures, and each has its row."""
    case = bench_gpu.Case(SAMPLE, side=64, steps=2, guidance=4.0, called={"guidance_scale": 4.0})
    files = bench_gpu.write_random(SAMPLE, tmp_path, torch.float32)
    rows = bench_gpu.measured(case, files, "cpu", pairs=2, jobs=2)
    assert [re.sub(".*: ", "", what) for what, _, _ in rows] == [
        "a job",
        "2 jobs, engine",
        "2 jobs, plain pipeline",
        "VAE decoding, channels last",
    ]
    assert "pictures up to 0 levels apart" in rows[0][2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU the bench ends with a line that says so."""
    bench_gpu.main()
    assert "skipped" in capsys.readouterr().out
