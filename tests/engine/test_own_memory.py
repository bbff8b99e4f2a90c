"""A loaded model is in memory of its own: its files may go, be cut short, and are not counted as free memory.

Linux counts the pages of a mapped file as available; who has weights there counts them twice.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.gpu_check.tiny.families import tiny as tiny_model
from studio_worker.gpu_check.tiny.model import FORMS, Form
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import request
from tests.lab.memory import GIB, Fake

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

DEFAULTS = CliDefaults(width=64, height=64, steps=1, cfg_scale=2.0)


def mapped(folder: Path) -> list[str]:
    """The files below ``folder`` that this process has mapped."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if str(folder) in line})


@pytest.mark.parametrize("where", ["device", "ram"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sd1", "flux1-dev", "z-image", "qwen-image"])
def test_loaded_model_rests_on_no_file(name: str, form: Form, where: str, tmp_path: Path) -> None:
    """Whatever form its files have, and wherever it waits, a loaded model and its LoRA have nothing of them
    mapped: a file that goes frees its room at once, and one that is cut short ends no process.
    """
    tiny = tiny_model(name, tmp_path)
    if form not in tiny.forms():
        pytest.skip("not published so")
    files: tuple[LocalFile, ...] = (*tiny.files(form), tiny.lora())
    defaults = DEFAULTS.model_copy(update={"offload_to_cpu": where == "ram"})
    engine = DiffusionEngine("cpu", families=[tiny.family], memory=Fake(4 * GIB, host=4 * GIB))
    engine.generate(request(files=files, defaults=defaults), lambda done, total: None, Cancel())
    assert [found.place for found in engine.resident().values()] == [where]
    assert mapped(tmp_path) == []
