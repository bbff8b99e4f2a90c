"""What the check found: a table that grows, and a file that holds everything, written after every row."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from studio_worker import __version__
from studio_worker.files import write_atomic
from studio_worker.gpu_check.rows import Found


class Report:
    """Of one check.

    Args:
        path: the file; that it cannot be written is an error at the start alone.
        device: what it is about, in words.
        show: is given each line of the table.
    """

    def __init__(self, path: Path, device: str, show: Callable[[str], None]) -> None:
        self._path = path
        self._show = show
        self._found: list[Found] = []
        self._facts: dict[str, Any] = {
            "studio_worker": __version__,
            "device": device,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._write()

    def add(self, found: Found) -> None:
        """One more row."""
        self._found.append(found)
        self._show(found.line())
        self._try_to_write()

    def counts(self) -> Counter[str]:
        """How many rows there are of each state."""
        return Counter(found.state for found in self._found)

    def close(self, seconds: float) -> int:
        """Show what failed once more, with traces, and the sum; returns the exit status."""
        failed = [found for found in self._found if found.state == "failed"]
        for found in failed:
            self._show(f"\n{found.name}: {found.error}")
            for line in found.trace.splitlines():
                self._show(f"    {line[:200]}")
        counts = self.counts()
        states = ("ok", "failed", "skipped", "left out")
        told = ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
        self._facts |= {"seconds": round(seconds, 1), "counts": dict(counts)}
        problem = self._try_to_write()
        where = (
            f"{self._path} could not be written: {problem}" if problem else f"everything is in {self._path}"
        )
        self._show(f"\n{told} in {seconds:.0f} s; {where}")
        return 1 if failed else os.EX_IOERR if problem else os.EX_OK

    def _try_to_write(self) -> str:
        """What keeps the file from being written; empty where nothing does. The table goes on."""
        try:
            self._write()
        except OSError as error:
            return error.strerror or type(error).__name__
        return ""

    def _write(self) -> None:
        content = {**self._facts, "rows": [found.as_json() for found in self._found]}
        write_atomic(self._path, json.dumps(content, indent=1).encode())
