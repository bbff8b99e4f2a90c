"""Where files of gigabytes can be written for a while."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

NEEDED_BYTES = 20_000_000_000
"""Two models in full size, and room to breathe."""

_IN_MEMORY = {"tmpfs", "ramfs"}


def folder_for_files() -> Path:
    """A folder with room, on a disk rather than in memory; where none has room, the one that has most."""
    named = (Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/dev/shm"))
    there = [folder for folder in named if os.access(folder, os.W_OK)]
    roomy = [folder for folder in there if free_bytes(folder) >= NEEDED_BYTES]
    return max(roomy or there, key=lambda folder: (is_on_disk(folder) if roomy else 0, free_bytes(folder)))


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def is_on_disk(folder: Path, mounts: str | None = None) -> bool:
    """Whether what is written there ever leaves memory (proc_pid_mounts(5))."""
    text = Path("/proc/self/mounts").read_text(encoding="utf-8") if mounts is None else mounts
    found = [line.split()[1:3] for line in text.splitlines()]
    around = [(place, kind) for place, kind in found if folder.resolve().is_relative_to(place)]
    return max(around, key=lambda each: len(each[0]), default=("/", ""))[1] not in _IN_MEMORY
