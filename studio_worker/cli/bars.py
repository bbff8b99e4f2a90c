"""What a terminal shows while something takes its time; a pipe shows nothing of it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any


class FileBars:
    """One bar for each file. The methods may be called from any thread."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> FileBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def moved(self, file: Any, done: int, total: int | None) -> None:
        self._show(file.filename, done, total or file.approx_bytes, key=file.sha256 or file.url)

    def reading(self, file: Any, done: int, total: int | None) -> None:
        self._show(file.filename, done, total, "verifying", key=file.sha256 or file.url)

    def verified(self, file: Any, size_bytes: int) -> None:
        self._show(file.filename, size_bytes, size_bytes, "verified", key=file.sha256 or file.url)

    def of_bundle(self, file: Any, done: int) -> None:
        self._show(file.filename, done, file.size, "read" if done == file.size else "", key=file.sha256)

    def whole(self, name: str) -> Callable[[int, int | None], None]:
        """One bar for all files, one after the other."""
        return lambda done, total: self._show(name, done, total)

    def _show(self, name: str, done: int, total: int | None, state: str = "", *, key: str = "") -> None:
        with self._lock:
            if (name, key) not in self._tasks:
                self._tasks[name, key] = self._bars.add_task(name, total=total, state="")
            self._bars.update(self._tasks[name, key], completed=done, total=total, state=state)


class PictureBar:
    """One bar: fetching the model, loading it, the steps of the picture."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not os.isatty(2),
            transient=True,
        )
        self._task = self._bar.add_task("looking for the model", total=None)

    def __enter__(self) -> PictureBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def fetched(self, done: int, total: int | None) -> None:
        mb = None if total is None else total // 1_000_000
        self._bar.update(self._task, description="fetching (MB)", completed=done // 1_000_000, total=mb)

    def loading(self) -> None:
        self._bar.update(self._task, description="loading the model", completed=0, total=None)

    def stepped(self, step: int, steps: int) -> None:
        if step == 0:  # a sign of life
            return
        self._bar.update(self._task, description="steps", completed=step, total=steps)
