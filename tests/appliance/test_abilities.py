"""What the box says of itself when an offer is judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from studio_worker.appliance import abilities as module
from studio_worker.box.device import Device
from studio_worker.config.settings import Settings
from studio_worker.studio.session.offers import Refuse, Take, judge
from tests.lab.abilities import FullEngine, abilities_of
from tests.lab.frames import claim


@pytest.fixture
def memory_gb(tmp_path: Path) -> Callable[[str, FullEngine | None], float]:
    """The memory that offers are compared with, on a device of 24 GB."""

    def told(device: str, engine: FullEngine | None) -> float:
        _, situation = abilities_of(tmp_path, Device(device, device, 24.0), engine)
        return situation.memory_gb

    return told


def test_offers_are_compared_with_what_other_processes_leave(
    memory_gb: Callable[[str, FullEngine | None], float],
) -> None:
    """A job for which a GPU shared with others has no room is left to another worker before it is taken; a
    device that says nothing, or is not in use yet, counts whole.
    """
    assert memory_gb("cuda:0", FullEngine(9.5)) == 9.5
    assert memory_gb("cuda:0", FullEngine(None)) == 24.0
    assert memory_gb("cuda:0", None) == 24.0


def test_cpu_worker_compares_with_free_ram_from_the_start(
    memory_gb: Callable[[str, FullEngine | None], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where RAM is the device, what the machine has available counts even before the first job."""
    monkeypatch.setattr(module, "available_ram_bytes", lambda: int(3e9))
    assert memory_gb("cpu", None) == 3.0
    assert memory_gb("cpu", FullEngine(5.0)) == 5.0


CARD = Device("cuda:0", "a card of 24 GiB", 24 * 2**30 / 1e9)


@pytest.mark.parametrize(
    ("threshold_gib", "told", "taken", "left"), [(None, 24.0, 24.0, 24.1), (16.0, 16.0, 16.0, 16.1)]
)
def test_studio_is_told_gib_and_its_estimates_are_gib(
    tmp_path: Path, threshold_gib: float | None, told: float, taken: float, left: float
) -> None:
    """The wire counts in GiB, as the upstream worker does: a card of 24 GiB is told as 24, and takes a 24."""
    settings = Settings.model_validate({"worker": {"vram_threshold_gb": threshold_gib}})
    abilities, situation = abilities_of(tmp_path, CARD, settings=settings)
    capabilities = abilities.capabilities()
    assert (capabilities.vram_total_gb, capabilities.vram_threshold_gb) == (24.0, told)
    assert isinstance(judge(claim(vramGbEstimate=taken), situation), Take)
    refused = judge(claim(vramGbEstimate=left), situation)
    assert isinstance(refused, Refuse)
    assert refused.code is None
    assert f"needs {left:g} GiB and this worker takes up to {told:g} GiB" in refused.reason
