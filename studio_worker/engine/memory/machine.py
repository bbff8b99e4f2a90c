"""How much memory a device and its machine have left, for whoever decides what stays loaded."""

from __future__ import annotations

import gc
from typing import Protocol

import torch

from studio_worker.box.process import give_memory_back
from studio_worker.box.ram import available_ram_bytes, total_ram_bytes

_KEPT_FREE_SHARE = 0.05
"""Of each memory: what fragmentation, libraries' workspaces and the rest of the machine need."""


class Memory(Protocol):
    """What there is to decide with. Bytes.

    ``ours`` is always what this process's components take there now and could let go.
    """

    has_host: bool
    """Whether RAM is another place than the device, so that components can wait there."""

    def on_device(self, ours: int) -> int:
        """What is there for components and pictures being made together."""
        ...

    def on_host(self, ours: int) -> int:
        """What is there in RAM for components that wait."""
        ...

    def start_counting(self) -> None:
        """Forget what was the most until now."""
        ...

    def peak(self) -> int | None:
        """The most that this process has had on the device at a time since; ``None`` where nobody counts."""
        ...


class MachineMemory:
    """The memory of this machine and of ``device``, as it is at each moment.

    Other processes' share is not ours: a picture made by hand beside the service sees what that left.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.has_host = device.type != "cpu"

    def on_device(self, ours: int) -> int:
        cached = 0
        if self._device.type == "cuda":  # torch's allocator keeps what was freed, and gives it out again
            cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return _without_reserve(free_bytes(self._device) + cached + ours, total_bytes(self._device))

    def on_host(self, ours: int) -> int:
        cpu = torch.device("cpu")
        return _without_reserve(free_bytes(cpu) + ours, total_bytes(cpu))

    def start_counting(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self._device)) if self._device.type == "cuda" else None


def _without_reserve(free: int, total: int) -> int:
    return max(0, free - int(total * _KEPT_FREE_SHARE))


def total_bytes(device: torch.device) -> int:
    """Memory that ``device`` has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_ram_bytes()


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_ram_bytes()


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def release_cached(device: torch.device) -> None:
    """Give memory that nothing uses back to ``device`` and to the system."""
    gc.collect()  # pipelines hold reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    give_memory_back()
