"""The device as rows use it: what only CUDA can tell or do, behind one thin seam.

Imports no torch; :mod:`devices` has both of them, a GPU and a CPU in its place.
"""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager
from typing import Protocol

from studio_worker.gpu_check.trace import Trace


class Shares:
    """How much of the time the GPU had something to compute, as its driver tells it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.seen) if self.seen else None


class Gpu(Protocol):
    """A device. ``name`` is torch's name of it."""

    name: str
    is_cuda: bool

    def works(self) -> bool:
        """Whether it still computes: after some errors a process has lost its GPU."""
        ...

    def release_cached(self) -> None:
        """Give memory back that nothing uses."""
        ...

    def total_bytes(self) -> int: ...

    def free_bytes(self) -> int: ...

    def allocated_bytes(self) -> int | None:
        """What this process's tensors take on it."""
        ...

    def begin_peak(self) -> None:
        """From now on is the time that :meth:`peak_bytes` is about."""
        ...

    def peak_bytes(self) -> int | None:
        """The most that this process's tensors have taken on it at once."""
        ...

    def scarce(self, spare_bytes: int) -> AbstractContextManager[None]:
        """Inside, this process gets little more memory than it has."""
        ...

    def watched(self) -> AbstractContextManager[Shares]:
        """Filled while the block runs."""
        ...

    def profiled(self) -> AbstractContextManager[list[Trace]]:
        """Has one trace of the block, after it."""
        ...

    def waits(self) -> AbstractContextManager[list[str]]:
        """Filled with the places, ``file.py:12``, at which the block waits for the device."""
        ...
