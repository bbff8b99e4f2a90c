"""What stays loaded and where: components by the contents of their files, on the device or in RAM.

This module owns the memory as far as weights go. Where the next component would not fit, the one used
longest ago leaves the device, for RAM where there is room, else altogether; but before any does, those with
unpacked matrices have them packed again. What came from RAM is there beside the device, until RAM is short.
Two models that share a file share the component. It knows no model family.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch

from studio_worker.engine.contract import Resident
from studio_worker.engine.memory.held import Held, Place
from studio_worker.engine.memory.machine import Memory, release_cached, total_bytes
from studio_worker.engine.memory.pinned import PinnedMemory

_LOG = logging.getLogger(__name__)

_CPU_SHARE = 0.5
"""Of what is free on a CPU worker: the rest of the machine needs the other half."""

_PINNED_SHARE = 0.5
"""Of all RAM, how much components may have pinned: the rest of the machine gets none of it, however short it
is (CUDA C++ Best Practices Guide, pinned memory)."""


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
        device: where pictures are made.
        memory: what there is.
        budget_bytes: how many bytes of weights may stay on the device, whatever there is. What one job needs
            may exceed it: it is then alone.
    """

    def __init__(self, device: torch.device, memory: Memory, budget_bytes: int | None = None) -> None:
        self._device = device
        self._memory = memory
        self._budget_bytes = budget_bytes
        self._pinned = PinnedMemory(device, int(total_bytes(torch.device("cpu")) * _PINNED_SHARE))
        self._held: OrderedDict[Key, Held] = OrderedDict()
        self._made_of: dict[str, tuple[Key, ...]] = {}
        self.models: Mapping[str, Resident] = {}
        """Models that are wholly resident, by name; shared components count for each. Replaced as a whole at
        every change, so that other threads may read it.
        """

    def size_bytes(self, place: Place = Place.DEVICE) -> int:
        """Bytes of all weights in ``place``. From any thread."""
        return sum(held.size_bytes for held in tuple(self._held.values()) if held.place is place)

    def ram_bytes(self) -> int:
        """What all components take in RAM, those that are on the device, too, included. From any thread."""
        return sum(held.ram_bytes for held in tuple(self._held.values()))

    def lacking_bytes(self, keys: Iterable[Key]) -> int:
        """What RAM needs for those of ``keys`` that are loaded to be there."""
        return sum(self._held[key].lacking_bytes for key in set(keys) if key in self._held)

    def drop_torn(self, keys: Iterable[Key]) -> None:
        """Let those of ``keys`` go that are not wholly where they should be, whatever happened to them, so
        that they are loaded anew.
        """
        for key in [key for key in keys if key in self._held and self._held[key].is_torn()]:
            held = self._held.pop(key)
            _LOG.warning("a component is loaded anew", extra={"component": type(held.component).__name__})
            self._show()

    def size_bytes_of(self, keys: Iterable[Key], place: Place) -> int:
        """Bytes of those of ``keys`` that are in ``place``."""
        return sum(self._held[key].size_bytes for key in set(keys) if self.place(key) is place)

    def place(self, key: Key) -> Place | None:
        """Where the component of ``key`` is; ``None`` where it is not loaded."""
        held = self._held.get(key)
        return None if held is None else held.place

    def get(self, key: Key, place: Place = Place.DEVICE) -> torch.nn.Module | None:
        """The component of ``key``, now in ``place`` and the most recently used; ``None`` where it is not
        loaded. Room must have been made.
        """
        held = self._held.get(key)
        if held is None:
            return None
        self._held.move_to_end(key)
        held.move(place)
        return held.component

    def add(self, key: Key, component: torch.nn.Module, place: Place = Place.DEVICE) -> None:
        """Keep ``component``, which is in ``place``, as the most recently used."""
        self._held[key] = Held(component, place, self._device, self._pinned)

    def make_room(self, weights_bytes: int, working_bytes: int = 0, keep: Iterable[Key] = ()) -> None:
        """Let components leave the device, least recently used first, until it has room, or only those to
        keep are left.

        Args:
            weights_bytes: of components that are to come.
            working_bytes: that are needed beside all weights while a picture is made.
        """
        kept = set(keep)
        leaving = [k for k, held in self._held.items() if k not in kept and held.place is Place.DEVICE]
        # Asked once: what leaves is given back to the device only below.
        available = self._memory.on_device(self.size_bytes())
        limit = min(self._weights_limit(available), available - working_bytes)

        def is_short() -> bool:
            return self.size_bytes() + weights_bytes > limit

        for key in leaving:
            if is_short() and self._memory.has_host:
                self.pack(key)
        self._leave(leaving, kept, is_short)

    def _weights_limit(self, available: int) -> int:
        if self._budget_bytes is not None:
            return self._budget_bytes
        return available if self._memory.has_host else int(available * _CPU_SHARE)

    def spare_bytes(self, keep: Iterable[Key]) -> int:
        """What the device has for those of ``keep`` and a picture while all others stay there as they are."""
        available = self._memory.on_device(self.size_bytes())
        others = self.size_bytes() - self.size_bytes_of(keep, Place.DEVICE)
        return min(available, self._weights_limit(available)) - others

    def is_unpacked(self, key: Key) -> bool:
        """Whether the component of ``key`` is loaded, and all its packed matrices are written out."""
        held = self._held.get(key)
        return held is not None and held.is_unpacked

    def unpack(self, key: Key, on_matrix: Callable[[], object] = bool) -> None:
        """Write out the packed matrices of a component on the device, for which it has room.

        They stay in RAM as they were, so that it costs little to go back; where that has no room for them,
        nothing happens. ``on_matrix`` is called after each, and may raise.
        """
        held, keeps = self._held[key], self._memory.has_host
        used = self.ram_bytes()
        if held.is_unpacked:
            return
        if keeps and used + held.to_keep_bytes() > self._memory.on_host(used):
            return
        try:
            held.unpack(keeps=keeps, on_matrix=on_matrix)
        finally:
            self._show()

    def pack(self, key: Key) -> None:
        """Have the matrices of a component on the device packed again that were so; where nothing was kept
        of them, the component goes.
        """
        held = self._held.get(key)
        if held is None or not held.unpacked_bytes:
            return
        if self._memory.has_host:
            held.pack()
        else:
            del self._held[key]
        self._show()

    def weigh(self) -> None:
        """Find out anew how large all components are: LoRAs have come into some, or have gone."""
        for held in self._held.values():
            held.weigh()
        self._show()

    def release(self) -> None:
        """Let every component leave the device."""
        # The one used last comes first: where RAM has no room for all, it stays.
        leaving = [key for key, held in reversed(self._held.items()) if held.place is Place.DEVICE]
        self._leave(leaving, set(leaving), lambda: True)

    def _leave(self, leaving: Iterable[Key], kept: set[Key], goes_on: Callable[[], bool]) -> None:
        """Let components leave the device one by one, for RAM where it has room without those of ``kept``."""
        lowered = dropped = 0
        for key in leaving:
            if not goes_on():
                break
            held = self._held[key]
            if held.lacking_bytes == 0 or self._make_host_room(held.lacking_bytes, kept | {key}, {key}):
                held.move(Place.RAM)
                lowered += 1
            else:
                del self._held[key]
                dropped += 1
        if lowered or dropped:
            self._show()
            release_cached(self._device)
            _LOG.info(
                "components left the device",
                extra={"to_ram": lowered, "unloaded": dropped, "resident_bytes": self.size_bytes()},
            )

    def _make_host_room(self, size_bytes: int, kept: Collection[Key], copied: Collection[Key]) -> bool:
        """Whether RAM has room for so much more: copies of what is on the device have left it, the last used
        first, since that leaves the device last; then components that wait there longest.

        Where it would not suffice that all of them left, none does.

        Args:
            kept: components that stay loaded.
            copied: those whose copies stay.
        """
        if not self._memory.has_host:
            return False
        copies, waiting = self._copies(copied), self._waiting(kept)
        used = self.ram_bytes()
        excess = used + size_bytes - self._memory.on_host(used)
        there = sum(self._held[key].copy_bytes for key in copies)
        if excess > there + sum(self._held[key].size_bytes for key in waiting):
            return False
        for key in copies:
            if excess > 0:
                excess -= self._held[key].copy_bytes
                self._held[key].drop_copy()
        for key in waiting:
            if excess > 0:
                excess -= self._held.pop(key).size_bytes
        return True

    def _copies(self, kept: Collection[Key]) -> list[Key]:
        """Components that are on the device and in RAM, the last used first."""
        return [k for k, held in reversed(self._held.items()) if k not in kept and held.copy_bytes]

    def _waiting(self, kept: Collection[Key]) -> list[Key]:
        return [k for k, held in self._held.items() if k not in kept and held.place is Place.RAM]

    def make_host_room(self, size_bytes: int, keep: Iterable[Key]) -> None:
        """Let what is in RAM leave, least recently used first, until it has room or none is left."""
        kept, before = set(keep), self.ram_bytes()
        if not self._make_host_room(size_bytes, kept, kept):  # they come all the same
            for key in self._copies(kept):
                self._held[key].drop_copy()
            for key in self._waiting(kept):
                del self._held[key]
        if self.ram_bytes() < before:
            self._show()
            release_cached(self._device)

    def components(self, model: str) -> tuple[torch.nn.Module, ...]:
        """What ``model`` is made of; nothing where it is not wholly loaded."""
        return tuple(self._held[key].component for key in self._made_of.get(model, ()))

    def name(self, model: str, keys: Iterable[Key]) -> None:
        """``model`` is made of these components."""
        self._made_of[model] = tuple(keys)
        self._show()

    def clear(self) -> None:
        """Let every component go, and give cached memory back."""
        self._held.clear()
        self._show()
        release_cached(self._device)

    def _show(self) -> None:
        self._made_of = {
            model: keys for model, keys in self._made_of.items() if all(key in self._held for key in keys)
        }
        self.models = {
            model: Resident(
                sum(self._held[key].size_bytes for key in keys),
                " and ".join(sorted({self._held[key].place.value for key in keys})),
                any(self._held[key].is_unpacked for key in keys),
            )
            for model, keys in self._made_of.items()
        }
