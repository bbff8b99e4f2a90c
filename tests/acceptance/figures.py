"""Figures that checks have measured, for the table at the end of the run; gathered from all its processes."""

from __future__ import annotations

_FIGURES: dict[str, tuple[str, str]] = {}


def note(name: str, value: str, goal: str = "") -> None:
    """Keep a figure; ``goal`` as text, for whoever reads the table."""
    _FIGURES[name] = (value, goal)


def noted() -> dict[str, tuple[str, str]]:
    """All figures of this process."""
    return _FIGURES


def table() -> list[str]:
    """The lines of the table."""
    width = max((len(name) for name in _FIGURES), default=0)
    return [
        f"{name:<{width}}  {value}" + (f"   (goal: {goal})" if goal else "")
        for name, (value, goal) in _FIGURES.items()
    ]
