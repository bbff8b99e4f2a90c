"""The disk of the worker's state, which goes read-only as after an error, and is mended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

_BUSY_S = 10.0
"""A file that is being written keeps a file system from being made read-only by order."""


class StateDisk:
    """Outbox and spool of a state folder on disks of their own; a context manager, unmounted at its end.

    Only root can mount: ``is_there`` says whether that was done. Without it nothing goes read-only.
    """

    def __init__(self, state: Path) -> None:
        self._folders = [state / "outbox", state / "spool"]
        self._mounted: list[Path] = []

    @property
    def is_there(self) -> bool:
        return bool(self._mounted)

    def __enter__(self) -> Self:
        for folder in self._folders:
            folder.mkdir(parents=True, mode=0o700)
            command = ["mount", "-t", "tmpfs", "-o", "size=500m,mode=0700", "tmpfs", str(folder)]
            if os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
                self._mounted.append(folder)
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written, removed or renamed meanwhile; what is there can be read."""
        try:
            for folder in self._mounted:
                deadline = time.monotonic() + _BUSY_S
                while (done := _remount(folder, "ro")).returncode and time.monotonic() < deadline:
                    time.sleep(0.01)
                done.check_returncode()
            yield
        finally:
            for folder in self._mounted:
                _remount(folder, "rw").check_returncode()


def _remount(folder: Path, way: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", "-o", f"remount,{way}", str(folder)], capture_output=True)
