"""The bytes of results and input pictures: files of one folder, by keys that the database holds.

Bytes are there before a row names them, and go after it has gone: a crash in between leaves a file too many,
never a row without its picture. At the start such files of the last run go; no other that is whole is removed
unasked, be it from before, of another database or a person's own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from studio_worker.errors import ProtocolError
from studio_worker.files import DISK_TROUBLES, remove_temporaries, store_atomic

_KEY_BYTES = 8
"""Two deliveries of one job may come at the same moment; each has a file of its own."""
_KEY = re.compile(rf".+-[0-9a-f]{{{2 * _KEY_BYTES}}}\.[a-z0-9]+")


class StorageFull(ProtocolError):
    """The disk takes no more of the studio's data; nothing of this step was kept."""


@dataclass(frozen=True)
class StoredBytes:
    """Where some bytes lie, and how many they are."""

    key: str
    size_bytes: int


class Pictures:
    """One folder, for this user alone; it is made when the first picture comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        """Keep what ``content`` has from where it stands, piece by piece. Raises StorageFull.

        Args:
            name: what people who look into the folder may know it by.
        """
        key = f"{name}-{secrets.token_hex(_KEY_BYTES)}.{ext}"
        with _telling_of_the_disk():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return StoredBytes(key, store_atomic(self.path(key), content))

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self._folder / key

    def delete(self, key: str) -> None:
        """Forget the bytes; they may be gone already. Raises StorageFull where the disk is read-only."""
        with _telling_of_the_disk():
            self.path(key).unlink(missing_ok=True)

    def clear_unfinished(self) -> None:
        """Remove what a crash left half-written. Only while no other studio has the folder."""
        if self._folder.is_dir():
            remove_temporaries(self._folder)

    def remove_unnamed(self, named: Collection[str], since: float) -> int:
        """Remove files that no row names and that were written after ``since``; returns how many. Only while
        no delivery can come.
        """
        removed = 0
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            if path.name not in named and _KEY.fullmatch(path.name):
                with suppress(OSError):  # one file too many harms nobody
                    if path.stat().st_mtime > since:
                        path.unlink()
                        removed += 1
        return removed


@contextmanager
def _telling_of_the_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_TROUBLES:
            raise
        raise StorageFull(f"the studio's disk takes no more data ({error.strerror})") from error
