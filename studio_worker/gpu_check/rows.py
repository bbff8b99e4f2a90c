"""A row: one thing that is looked at, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from studio_worker.errors import StudioWorkerError

State = Literal["ok", "failed", "skipped", "left out"]


class Skipped(StudioWorkerError):
    """It cannot be looked at here; the text says why."""


class Missed(StudioWorkerError):
    """What was found is not what is promised; the text says by how much."""


@dataclass(frozen=True)
class Row:
    """One thing to look at.

    Args:
        name: what the table calls it.
        work: what looks at it: a module of this package and a function in it, ``matrix:compare``.
        given: the function's arguments, as JSON can hold them.
        limit_s: when it counts as hung; its process is then ended.
        together: whether it may run beside others, in a process of its own each. Nothing is timed there.
    """

    name: str
    work: str
    given: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float = 60.0
    together: bool = False


@dataclass
class Found:
    """What became of a row. ``figures`` hold what was found until it ended, however it ended."""

    name: str
    state: State = "left out"
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    trace: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """It as one line of a table; figures that are tables themselves are left to the file."""
        told = "  ".join(
            f"{name} {shown(value)}"
            for name, value in self.figures.items()
            if isinstance(value, int | float | str)
        )
        return f"{self.state:8} {self.name:44} {self.seconds:6.1f} s  {self.error or told}".rstrip()


def shown(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
