"""Pictures as files of one folder, for this user alone.

At the start what a crash of the last run left without a row goes; no other file that is whole is removed
unasked, be it from before, of another database or a person's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from studio_worker.files import DISK_TROUBLES, remove_temporaries, store_atomic
from studio_worker.local_studio.pictures.port import (
    PictureGone,
    Reading,
    StorageFull,
    StoredBytes,
    is_key,
    new_key,
)


class Folder:
    """One folder; it is made when the first picture comes. See :class:`port.Pictures` for its methods."""

    is_shared = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def check(self, _owner: str, /) -> None:
        """Nothing: a folder is made when it is needed, and disks fail later than at the start."""

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        key = new_key(name, ext)
        with _telling_of_the_disk():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return StoredBytes(key, store_atomic(self.file(key), content))

    def open(self, key: str, _asked: str | None = None, /) -> Reading:
        try:
            content = self.file(key).open("rb")
        except OSError as error:
            raise PictureGone("the picture's file is not in the studio's folder any more") from error
        return Reading(content, self.file(key).stat().st_size)

    def file(self, key: str) -> Path:
        return self._folder / key

    def address(self, _key: str, /) -> str | None:
        return None

    def delete(self, key: str) -> None:
        with _telling_of_the_disk():
            self.file(key).unlink(missing_ok=True)

    def clear_unfinished(self) -> None:
        if self._folder.is_dir():
            remove_temporaries(self._folder)

    def remove_unnamed(self, named: Collection[str], since: float, until: float = float("inf")) -> int:
        removed = 0
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            if path.name not in named and is_key(path.name):
                with suppress(OSError):  # one file too many harms nobody
                    if since < path.stat().st_mtime < until:
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
