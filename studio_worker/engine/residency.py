"""What stays loaded: components by the contents of their files, within a byte budget.

This module owns the memory of the device as far as weights go: the least recently used component leaves when
the next one would not fit. Two models that share a file share the component. It knows no model family.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

_LOG = logging.getLogger(__name__)

_RAM_SHARE = 0.5
"""Of all RAM on a CPU worker: the pictures being made, and the rest of the machine, need the other half."""

_VRAM_SHARE = 0.75
"""Of a CUDA device's memory: a quarter for activations, the CUDA context and fragmentation."""


class Key(NamedTuple):
    """What makes two components the same.

    Attributes:
        kind: class and configuration.
        content: what identifies the weights: contents (not name) of the file, and the place in it.
        dtype: the type the weights were loaded as.
    """

    kind: str
    content: str
    dtype: torch.dtype


class Residency:
    """Loaded components, least recently used first. For one thread.

    Args:
        device: where the weights live.
        budget_bytes: how many bytes of weights may stay. What one job needs may exceed it: it is then alone.
    """

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self._device = device
        self._budget_bytes = budget_bytes
        self._resident: OrderedDict[Key, tuple[torch.nn.Module, int]] = OrderedDict()
        self._made_of: dict[str, tuple[Key, ...]] = {}
        self.models: Mapping[str, int] = {}
        """Models that are wholly resident, by name, and their bytes; shared components count for each.
        Replaced as a whole at every change, so that other threads may read it.
        """

    @property
    def size_bytes(self) -> int:
        """Bytes of all resident weights."""
        return sum(size_bytes for _, size_bytes in self._resident.values())

    def get(self, key: Key) -> torch.nn.Module | None:
        """The component of ``key`` where it is resident; it is then the most recently used."""
        if key not in self._resident:
            return None
        self._resident.move_to_end(key)
        return self._resident[key][0]

    def make_room(self, needed_bytes: int, keep: Iterable[Key] = ()) -> None:
        """Let components go until ``needed_bytes`` more fit the budget, or none is left but those to keep."""
        kept = set(keep)
        leaving = [key for key in self._resident if key not in kept]
        count = 0
        while leaving and self.size_bytes + needed_bytes > self._budget_bytes:
            del self._resident[leaving.pop(0)]
            count += 1
        if count:
            self._show()
            release_cached(self._device)
            _LOG.info("components unloaded", extra={"count": count, "resident_bytes": self.size_bytes})

    def add(self, key: Key, component: torch.nn.Module) -> None:
        """Keep ``component``, as the most recently used."""
        self._resident[key] = (component, weight_bytes(component))

    def name(self, model: str, keys: Iterable[Key]) -> None:
        """``model`` is made of these components."""
        self._made_of[model] = tuple(keys)
        self._show()

    def clear(self) -> None:
        """Let every component go, and give cached memory back to the device."""
        self._resident.clear()
        self._show()
        release_cached(self._device)

    def _show(self) -> None:
        self._made_of = {
            model: keys for model, keys in self._made_of.items() if all(key in self._resident for key in keys)
        }
        self.models = {
            model: sum(self._resident[key][1] for key in keys) for model, keys in self._made_of.items()
        }


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def release_cached(device: torch.device) -> None:
    """Give memory that nothing uses back to ``device``."""
    gc.collect()  # pipelines hold reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def default_budget_bytes(device: torch.device) -> int:
    """Bytes of weights that may stay on ``device`` where the operator did not say."""
    return int(total_bytes(device) * (_VRAM_SHARE if device.type == "cuda" else _RAM_SHARE))


def total_bytes(device: torch.device) -> int:
    """Memory that ``device`` has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # What Linux could give without swapping; the free pages that sysconf counts leave out the page cache.
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")  # every kernel since 3.14 has it
