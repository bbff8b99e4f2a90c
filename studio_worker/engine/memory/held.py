"""One loaded component: where it is, what it takes there, and its way from one place to the other.

What came to the device from RAM is in RAM still, and so are packed matrices while they are written out; from
there it comes back, and nothing is copied when it leaves. Whether there is room, residency.py asks.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch

from studio_worker.engine.files.packed import kept_bytes, pack, packed_linears, unpack, unpacked_bytes
from studio_worker.engine.memory.machine import weight_bytes
from studio_worker.engine.memory.pinned import PinnedMemory
from studio_worker.engine.memory.ram_copies import RamCopy, pin, ram_copy, to_device, to_ram, weights

_CPU = torch.device("cpu")


class Place(Enum):
    """Where a component is."""

    DEVICE = "device"
    RAM = "ram"


class Held:
    """A component that is loaded. For one thread; its attributes may be read from any.

    Args:
        device: the one that is meant by :attr:`Place.DEVICE`.
        pinned: where it lies when it is in RAM, as far as there is room.

    Attributes:
        size_bytes: of its weights where it is, as they are now.
        copy_bytes: of what is in RAM, too, and need not be.
        ram_bytes: what it takes in RAM, wherever it is.
        lacking_bytes: what RAM needs for it to leave the device.
        is_unpacked: whether all packed matrices are written out; on the device alone.
        unpacked_bytes: of those that are: also where that was broken off.
    """

    def __init__(
        self, component: torch.nn.Module, place: Place, device: torch.device, pinned: PinnedMemory
    ) -> None:
        if place is Place.RAM:
            pin(component, pinned)
        self.component, self.place = component, place
        self.is_unpacked = False
        self._device, self._pinned = device, pinned
        self._copy: RamCopy = ram_copy({})
        self.weigh()

    def weigh(self) -> None:
        """Find out anew what it takes."""
        self.size_bytes = weight_bytes(self.component)
        self.copy_bytes = sum(kept.nbytes for kept in self._copy.values())
        is_in_ram = self.place is Place.RAM
        self.ram_bytes = self.size_bytes if is_in_ram else self.copy_bytes + kept_bytes(self.component)
        self.unpacked_bytes = unpacked_bytes(self.component)
        packed_bytes = self.size_bytes - self.unpacked_bytes
        self.lacking_bytes = 0 if is_in_ram else max(0, packed_bytes - self.copy_bytes)

    def is_torn(self) -> bool:
        """Whether some of it is not where it should be, whatever went wrong."""
        device = self._device if self.place is Place.DEVICE else _CPU
        return any(tensor.device != device for tensor in weights(self.component))

    def move(self, place: Place) -> None:
        """Bring it to ``place``, packed. Where that fails it is where it was, or torn."""
        if self.place is place:
            return
        if place is Place.DEVICE:
            self._copy = to_device(self.component, self._device)
        else:
            pack(self.component, _CPU)
            self.is_unpacked = False
            to_ram(self.component, self._device, self._copy, self._pinned)
            self._copy = ram_copy({})
        self.place = place
        self.weigh()

    def drop_copy(self) -> None:
        """Take no more RAM than it must while it is on the device."""
        self._copy = ram_copy({})
        self.weigh()

    def to_keep_bytes(self) -> int:
        """What RAM needs to keep packed matrices while they are written out."""
        return sum(
            layer.weight.nbytes
            for layer in packed_linears(self.component)
            if layer.is_packed and layer.weight not in self._copy
        )

    def unpack(self, *, keeps: bool, on_matrix: Callable[[], object]) -> None:
        """Write out packed matrices on the device, one by one; with ``keeps`` they stay in RAM as they are.
        ``on_matrix`` is called after each, and may raise.
        """
        try:
            unpack(self.component, keeps=keeps, copy=self._copy, on_matrix=on_matrix)
            self.is_unpacked = True
        finally:
            self.weigh()

    def pack(self) -> None:
        """Have matrices on the device packed again, which were kept."""
        self.is_unpacked = False
        try:
            self._copy.update(pack(self.component, self._device))
        finally:
            self.weigh()
