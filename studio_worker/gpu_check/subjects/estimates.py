"""What the engine reckons that a picture needs, by the ways in which it can be made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from studio_worker.engine.families import identify
from studio_worker.engine.families.family import Family, JobKind
from studio_worker.engine.loading import computed_in
from studio_worker.engine.memory.machine import MachineMemory
from studio_worker.engine.memory.placement import Plan
from studio_worker.engine.rendering.needs import footprint
from studio_worker.models import LocalFile

GIB = 1 << 30


def plans(
    files: Sequence[LocalFile],
    family: Family,
    device: str,
    pixels: int,
    *,
    kind: JobKind = "text",
    guided: bool = True,
) -> tuple[Plan, ...]:
    """Every way to make a picture of the model of ``files``, the fastest first."""
    blueprint = identify([file for file in files if file.role != "lora"], (family,))
    loras = [file for file in files if file.role == "lora"]
    numbers = computed_in(family, torch.device(device))
    return footprint(blueprint, numbers, pixels, kind=kind, guided=guided, loras=loras).plans()


class Room:
    """A device of ``device_bytes`` in a machine that has room for all that waits."""

    has_host = True

    def __init__(self, device_bytes: int = 8 * GIB) -> None:
        self.device_bytes = device_bytes

    def on_device(self, ours: int) -> int:  # noqa: ARG002
        return self.device_bytes

    def on_host(self, ours: int) -> int:  # noqa: ARG002
        return 64 * GIB

    def start_counting(self) -> None:
        pass

    def peak(self) -> int | None:
        return None  # what one picture took must not place the next


class Capped(MachineMemory):
    """This machine's memory with a smaller device."""

    def __init__(self, device: str, most_bytes: int) -> None:
        super().__init__(torch.device(device))
        self._most_bytes = most_bytes

    def on_device(self, ours: int) -> int:
        return min(self._most_bytes, super().on_device(ours))
