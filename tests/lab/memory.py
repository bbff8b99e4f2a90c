"""What tests of memory share: a GPU and a RAM of so many bytes, needs of models, and ways to fill both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.memory.placement import Footprint, Mode, Plan
from studio_worker.engine.memory.residency import Key
from studio_worker.engine.rendering.needs import footprint
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import LocalFile
from tests.lab.engine import SAMPLE, SMALL, request

CPU = torch.device("cpu")
GIB = 2**30
MIB = 2**20
RAM = 64 * GIB


class Fake:
    """A GPU of ``device`` bytes in a machine with ``host`` bytes of RAM, which nobody else uses."""

    has_host = True

    def __init__(self, device: int, host: int = GIB) -> None:
        self.device, self.host = device, host
        self.most: int | None = None

    def on_device(self, ours: int) -> int:
        return self.device

    def on_host(self, ours: int) -> int:
        return self.host

    def start_counting(self) -> None:
        """Nobody counts, but where a test says what was the most."""

    def peak(self) -> int | None:
        return self.most


def sample_footprint(pixels: int = 64 * 64) -> Footprint:
    return footprint(identify([SAMPLE]), "float32", pixels)


def made(engine: DiffusionEngine, *files: LocalFile, **task: Any) -> Picture:
    return engine.generate(request(files=files or (SAMPLE,), **task), lambda done, total: None, Cancel())


def needs(**changed: Any) -> Footprint:
    """A model of a 10, a 4 and a 1 GiB component."""
    given = {
        "weights": {"transformer": 10 * GIB, "text_encoder": 4 * GIB, "vae": GIB},
        "denoiser": "transformer",
        "vae": "vae",
        "denoising": GIB,
        "decoding": 3 * GIB,
        "tile": GIB,
        "layers": {"transformer": GIB // 2, "text_encoder": GIB},
    }
    return Footprint(**{**given, **changed})


def key(name: str) -> Key:
    return Key(name, "content", torch.float32)


def component(kib: int) -> torch.nn.Module:
    return torch.nn.Linear(kib * 256, 1, bias=False)


def plan_of(mode: Mode, *, tiled: bool, pixels: int = 64 * 64) -> Plan:
    return next(p for p in sample_footprint(pixels).plans() if (p.mode, p.tiled) == (mode, tiled))


def fail_to_decode(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Decoding fails as on a full GPU, so many times; the tries so far."""
    decode, tries, left = AutoencoderKL.decode, list[int](), iter(range(times))

    def attempt(self: AutoencoderKL, *args: Any, **kwargs: Any) -> Any:
        tries.append(1)
        if next(left, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", attempt)
    return tries


def preloaded(engine: DiffusionEngine, file: LocalFile, times: int = 10**6) -> bool:
    """Preload, but for components after so many signs of life."""
    left = iter(range(times))
    return engine.preload(file.path.stem, [file], SMALL, lambda: next(left, None) is not None)
