"""What the functions that look at rows are given: the device, a folder, and somebody to tell figures to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio_worker.gpu_check.gpu import Gpu
from studio_worker.gpu_check.rows import Missed


class Lab:
    """For one process.

    Args:
        folder: for files, shared with other processes; removed at the end.
        small: whether this is a rehearsal, in which sizes are small and no goal of speed counts.
        tell: is told every figure as soon as it is known.
    """

    def __init__(self, gpu: Gpu, folder: Path, *, small: bool, tell: Callable[[str, Any], None]) -> None:
        self.gpu = gpu
        self.folder = folder
        self.small = small
        self._tell = tell
        self._kept: dict[str, tuple[str, Any]] = {}

    @property
    def device(self) -> str:
        """torch's name of it."""
        return self.gpu.name

    def note(self, **figures: Any) -> None:
        """Figures of the row that is looked at, units in their names."""
        for name, value in figures.items():
            self._tell(name, round(value, 4) if isinstance(value, float) else value)

    def goal(self, name: str, value: float, *, least: float | None = None, most: float | None = None) -> None:
        """Note a figure that is promised.

        Raises:
            Missed: it is not as good as that, and this is no rehearsal.
        """
        self.note(**{name: float(value)})
        if self.small:
            return
        if least is not None and value < least:
            raise Missed(f"{name} is {value:.3f}, and should be {least:g} at least")
        if most is not None and value > most:
            raise Missed(f"{name} is {value:.3f}, and should be {most:g} at most")

    def kept(self, slot: str, key: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, kept for the rows that follow; one thing a slot, the one before is let go
        first.
        """
        if slot not in self._kept or self._kept[slot][0] != key:
            self.forget(slot)
            self._kept[slot] = (key, make())
        return self._kept[slot][1]

    def forget(self, slot: str) -> None:
        """Let go of what is kept there."""
        if self._kept.pop(slot, None) is not None:
            self.tidy()

    def tidy(self) -> None:
        """Give memory back that nothing uses."""
        self.gpu.release_cached()
