"""`[worker] compile`: compiled blocks make the same pictures; a box that cannot compile says so at once."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from studio_worker.box.device import probe
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.rendering import compiling
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import LocalFile
from tests.bench.soak import write_loras
from tests.lab.engine import SAMPLE, SMALL, decoded, request
from tests.lab.memory import GIB, Fake

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: apt install g++")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


def made(engine: DiffusionEngine, *loras: LocalFile, offload: bool = False) -> Picture:
    asked = request(
        files=(SAMPLE, *loras), steps=2, defaults=SMALL.model_copy(update={"offload_to_cpu": offload})
    )
    return engine.generate(asked, lambda done, total: None, Cancel())


@needs_compiler
def test_compiled_blocks_make_the_same_picture(tmp_path: Path) -> None:
    """A compiled model's picture is that of the uncompiled one to within rounding, and says so; what was
    compiled is kept for the next start; a job with a LoRA, or offloaded, runs uncompiled, exactly as ever.
    """
    plain, compiling = DiffusionEngine("cpu"), DiffusionEngine("cpu", memory=Fake(GIB), compiles=True)
    expected, found = made(plain), made(compiling)
    assert found.meta["compiled"] is True
    assert "compiled" not in expected.meta
    pair = (np.asarray(decoded(each.data), dtype=int) for each in (expected, found))
    assert np.abs(np.subtract(*pair)).max() <= 1
    assert any((tmp_path / "compiled").rglob("*.so"))
    lora = write_loras(tmp_path)[0]
    with_lora = made(compiling, lora)
    assert "compiled" not in with_lora.meta
    assert with_lora.data == made(plain, lora).data
    offloaded = made(compiling, offload=True)
    assert "offload" in offloaded.meta
    assert "compiled" not in offloaded.meta
    assert offloaded.data == expected.data
    assert made(compiling).data == found.data


@needs_compiler
def test_compiler_that_fails_later_costs_no_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler that is gone after the start: the picture is the uncompiled one, and one line says why."""
    monkeypatch.setattr(compiling._WARNINGS, "failure", "")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/bin/false",))
    caplog.set_level(logging.ERROR, logger="torch")  # as in the service
    torch.compiler.reset()
    engine = DiffusionEngine("cpu", compiles=True)
    expected = made(DiffusionEngine("cpu")).data
    with caplog.at_level(logging.WARNING):
        assert made(engine).data == expected
    found = [r.__dict__ for r in caplog.records if r.name == "studio_worker.engine.rendering.compiling"]
    assert {line["message"] for line in found} == {"a block runs uncompiled"}
    assert all(line["levelname"] == "WARNING" and "\n" not in line["error"] for line in found)
    second = made(engine)
    assert (second.data, "compiled" in second.meta) == (expected, False)
    torch.compiler.reset()


@needs_compiler
def test_box_with_a_compiler_can_compile() -> None:
    """Before READY torch compiles something, where that is asked for."""
    assert probe("cpu", compiles=True)["ok"]


def test_box_without_a_compiler_is_told_before_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a compiler the start fails with a line that names the key and the cure; no job meets that."""
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = probe("cpu", compiles=True)
    assert not facts["ok"]
    assert "[worker] compile" in facts["error"]
    assert facts["error"].endswith("apt install g++ (from source python3-dev too), or set compile = false")
