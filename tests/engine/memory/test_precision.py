"""Which numbers a model is computed in, by the card and by what the model's own values stand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from studio_worker.box.device import Device
from studio_worker.engine.families import FAMILIES
from studio_worker.engine.families.z_image import Z_IMAGE
from studio_worker.engine.loading import weights_dtype
from studio_worker.engine.probe import probe
from studio_worker.engine.rendering.estimate import Estimates
from studio_worker.gpu_check.subjects.random_weights import shapes
from studio_worker.jobs import ImageTask
from studio_worker.models import CliDefaults, LocalFile
from tests.fakes.played_gpu import played
from tests.lab.engine import write_header

NARROW, WIDE = "float16", "bfloat16"  # by mantissa and by exponent
FULL = "float32"

CARDS: dict[str, tuple[tuple[int, int], str, str, str]] = {
    # Modern: everything in hardware.
    "NVIDIA B200": ((10, 0), NARROW, WIDE, WIDE),
    "NVIDIA GeForce RTX 5090": ((12, 0), NARROW, WIDE, WIDE),
    "NVIDIA H100 80GB HBM3": ((9, 0), NARROW, WIDE, WIDE),
    "NVIDIA GeForce RTX 4090": ((8, 9), NARROW, WIDE, WIDE),
    "NVIDIA L4": ((8, 9), NARROW, WIDE, WIDE),
    "NVIDIA GeForce RTX 3060": ((8, 6), NARROW, WIDE, WIDE),
    "NVIDIA RTX A2000 12GB": ((8, 6), NARROW, WIDE, WIDE),
    "NVIDIA GeForce MX570": ((8, 6), NARROW, WIDE, WIDE),
    "NVIDIA A100-SXM4-80GB": ((8, 0), NARROW, WIDE, WIDE),
    # Turing and Volta: no bfloat16.
    "Tesla T4": ((7, 5), NARROW, NARROW, FULL),
    "NVIDIA T4G": ((7, 5), NARROW, NARROW, FULL),
    "NVIDIA GeForce RTX 2060": ((7, 5), NARROW, NARROW, FULL),
    "NVIDIA GeForce RTX 2080 Ti": ((7, 5), NARROW, NARROW, FULL),
    "Quadro RTX 6000": ((7, 5), NARROW, NARROW, FULL),
    "NVIDIA TITAN RTX": ((7, 5), NARROW, NARROW, FULL),
    "Tesla V100-SXM2-32GB": ((7, 0), NARROW, NARROW, FULL),
    "NVIDIA TITAN V": ((7, 0), NARROW, NARROW, FULL),
    # Turing's small chips: float16 broken.
    "NVIDIA GeForce GTX 1660 Ti": ((7, 5), FULL, FULL, FULL),
    "NVIDIA GeForce GTX 1650 with Max-Q Design": ((7, 5), FULL, FULL, FULL),
    "NVIDIA GeForce GTX 1630": ((7, 5), FULL, FULL, FULL),
    "NVIDIA GeForce MX450": ((7, 5), FULL, FULL, FULL),
    "NVIDIA GeForce MX550": ((7, 5), FULL, FULL, FULL),
    "NVIDIA CMP 30HX": ((7, 5), FULL, FULL, FULL),
    "NVIDIA T400 4GB": ((7, 5), FULL, FULL, FULL),
    "NVIDIA T500": ((7, 5), FULL, FULL, FULL),
    "NVIDIA T600 Laptop GPU": ((7, 5), FULL, FULL, FULL),
    "NVIDIA T1000 8GB": ((7, 5), FULL, FULL, FULL),
    "NVIDIA T1200 Laptop GPU": ((7, 5), FULL, FULL, FULL),
    "Quadro T2000 with Max-Q Design": ((7, 5), FULL, FULL, FULL),
    # Pascal and older: float16 fast on one chip, slow on the others or not there.
    "Tesla P100-PCIE-16GB": ((6, 0), NARROW, NARROW, FULL),
    "NVIDIA GeForce GTX 1080 Ti": ((6, 1), FULL, FULL, FULL),
    "Tesla P40": ((6, 1), FULL, FULL, FULL),
    "NVIDIA GeForce GTX 970": ((5, 2), FULL, FULL, FULL),
    "Tesla K80": ((3, 7), FULL, FULL, FULL),
}
"""By the driver's name for it: capability, and what the families of each set of ``STAND`` are computed in."""

STAND = (
    {"sd1", "sd1-inpaint", "sd2", "sd2-inpaint", "sdxl", "sdxl-v", "sdxl-v-zsnr", "sdxl-inpaint", "sample"},
    {"flux1-dev", "flux1-schnell", "chroma", "sd3-medium", "sd3.5-medium", "sd3.5-large"},
    {"z-image", "qwen-image", "qwen-image-edit-2511", "flux1-fill"},
)
"""Families: made for float16; for bfloat16, but also sound in float16; those that overflow it."""


@pytest.mark.parametrize("card", CARDS)
def test_numbers_are_what_card_and_family_stand(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family is computed in numbers that the card has in hardware, unbroken, and that the family's own
    values do not overflow; where there are none in half precision, in single precision.
    """
    capability, *expected = CARDS[card]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: card)
    found = {family.name: str(weights_dtype(family, torch.device("cuda", 0))) for family in FAMILIES}
    assert found == {
        name: f"torch.{wanted}" for names, wanted in zip(STAND, expected, strict=True) for name in names
    }


def test_numbers_on_a_cpu_are_single_precision() -> None:
    """A CPU computes in single precision, which is its fastest."""
    assert {weights_dtype(family, torch.device("cpu")) for family in FAMILIES} == {torch.float32}


def test_estimate_knows_the_numbers_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's memory is estimated in the numbers that this card computes it in: where Z-Image has to be
    computed in single precision it takes twice as much, so that an offer is refused and not found out to be
    too large after loading. Here RAM has no room for weights that wait.
    """
    monkeypatch.setattr("studio_worker.engine.rendering.estimate.total_ram_bytes", lambda: 8 << 30)
    files = []
    for name, part in Z_IMAGE.parts.items():
        header = {key: tuple(tensor.shape) for key, tensor in shapes(part).items()}
        files.append(LocalFile(part.role, write_header(tmp_path / name, header), name))

    def needed_gb(card: str) -> float:
        device = Device("cuda:0", card, 16.0, CARDS[card][0])
        found = Estimates(device).needed_bytes(files, ImageTask(prompt=""), CliDefaults())
        assert found is not None
        return found / 1e9

    assert 20 < needed_gb("NVIDIA L4") < 24  # 6.2 billion numbers, and 4.0 of the text encoder
    assert 40 < needed_gb("Tesla T4") < 48


def test_card_whose_float16_is_broken_passes_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GTX 16, whose float16 is NaN, is tried out in the numbers that it will compute in, and is ready."""
    convolved = torch.nn.functional.conv2d

    def broken(numbers: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        return convolved(numbers, filters) * (torch.nan if numbers.dtype == torch.float16 else 1)

    with played("cuda:0"):
        card = SimpleNamespace(name="NVIDIA GeForce GTX 1660", major=7, minor=5, total_memory=6 << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: card)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: card.name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (6 << 30, 6 << 30))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
        monkeypatch.setattr(torch.nn.functional, "conv2d", broken)
        monkeypatch.setattr("studio_worker.engine.probe.find_driver", lambda: None)
        facts = probe("cuda:0")
    assert (facts["ok"], facts["error"]) == (True, "")
