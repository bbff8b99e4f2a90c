"""What a job needs, as it is known before the job is accepted."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from studio_worker.box.device import Device
from studio_worker.engine import Inputs
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.memory.placement import Mode
from studio_worker.engine.rendering.estimate import Estimates
from studio_worker.engine.rendering.needs import footprint
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel
from studio_worker.models import LocalFile
from tests.lab.engine import SAMPLE, SMALL, encoded, request, scene
from tests.lab.memory import (
    GIB,
    MIB,
    Fake,
    made,
    sample_footprint,
)

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


# --- headers ---


def test_need_is_known_from_the_headers() -> None:
    """Weights count as they are once loaded, and a larger picture needs more."""
    small, large = sample_footprint(), sample_footprint(1024 * 1024)
    engine = DiffusionEngine("cpu")
    made(engine)
    assert sum(small.weights.values()) == pytest.approx(
        engine.resident()["sample-model"].size_bytes, rel=0.01
    )
    assert large.decoding > 200 * small.decoding
    assert large.tile < large.decoding


# --- before a job is accepted ---


def test_estimate_is_told_without_torch() -> None:
    """What a job needs is known in a process that has not loaded torch, and grows with the picture."""
    script = """
import sys
from studio_worker import sample_model
from studio_worker.box.device import Device
from studio_worker.engine.rendering.estimate import Estimates
from studio_worker.jobs import ImageTask
from studio_worker.models import CliDefaults, LocalFile
file = LocalFile("model", sample_model.WEIGHTS, sample_model.SHA256)
told = Estimates(Device("cpu", "", 8.0))
for side in (64, 2048, 9000):
    print(told.needed_bytes([file], ImageTask(prompt="", width=side, height=side), CliDefaults()))
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    small, large, impossible = done.stdout.split()
    assert 15 * MIB < int(small) < 64 * MIB
    assert GIB < int(large) < 2 * GIB
    assert impossible == "None"  # the job itself says what is wrong with it


@pytest.mark.parametrize("kind", ["text", "mask", "lora", "unguided"])
def test_picture_is_made_with_what_its_offer_was_estimated_at(kind: str, tmp_path: Path) -> None:
    """What is estimated for an offer is what the engine then wants to have: with less it makes nothing."""
    files: tuple[LocalFile, ...] = (SAMPLE,)
    if kind == "lora":
        layer, path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", tmp_path / "lora"
        factors = {"lora_A": torch.ones(4, 104), "lora_B": torch.ones(104, 4)}
        save_file({f"{layer}.{name}.weight": factor for name, factor in factors.items()}, path)
        files = (SAMPLE, LocalFile("lora", path, "l"))
    inputs = Inputs(encoded(scene()), encoded(scene())) if kind == "mask" else Inputs()
    asked = request(files=files, inputs=inputs, cfg_scale=1.0 if kind == "unguided" else 4.0, width=128)
    needed = Estimates(Device("cpu", "", 8.0)).needed_bytes(files, asked.task, SMALL)
    assert needed is not None
    for size_bytes in (needed - 1, needed):
        memory = Fake(size_bytes)
        memory.has_host = False
        engine = DiffusionEngine("cpu", memory=memory)
        with pytest.raises(JobError, match="the picture needs") if size_bytes < needed else nullcontext():
            assert engine.generate(asked, lambda done, total: None, Cancel()).data


def test_estimate_counts_on_ram_only_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a picture is estimated to be made in the leanest way, layer by layer, so that small cards
    work, too; as a whole where the machine's RAM is smaller than the weights, so that no offer is accepted
    for what cannot be done.
    """

    device = Device("cuda:0", "NVIDIA L4", 24.0, (8, 9))

    def needed() -> int | None:
        return Estimates(device).needed_bytes([SAMPLE], request().task, SMALL)

    plans = {
        plan.mode: plan.peak_bytes
        for plan in reversed(footprint(identify([SAMPLE]), "float16", 64 * 64).plans())
    }
    assert needed() == plans[Mode.LAYERS] < plans[Mode.COMPONENT]
    monkeypatch.setattr("studio_worker.engine.rendering.estimate.total_ram_bytes", lambda: 4 * MIB)
    assert needed() == plans[Mode.WHOLE] > plans[Mode.COMPONENT]
