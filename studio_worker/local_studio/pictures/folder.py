"""Pictures as files of one folder, for this user alone.

A file named ``studio`` marks the folder as one database's. Where another's mark lies, or none, nothing is
ever removed unasked; in its own folder the studio removes what a crash left without a row, never what is a
person's own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.files import (
    DISK_FULL,
    DISK_TROUBLES,
    remove_temporaries,
    store_atomic,
    write_atomic,
    write_problem,
)
from studio_worker.local_studio.pictures.port import (
    MARK,
    PictureGone,
    Reading,
    StorageFull,
    StoredBytes,
    is_key,
    new_key,
)

_TROUBLES = DISK_TROUBLES | {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ESTALE,
}
"""Also those of a folder that somebody took away, or of which others changed the modes, since the start."""


class Folder:
    """One folder. See :class:`port.Pictures` for its methods.

    Args:
        is_beside: it is the default place, beside the database's file, and so that database's unless another
            has marked it.
    """

    is_shared = False

    def __init__(self, folder: Path, *, is_beside: bool = False) -> None:
        self.path = folder
        self._is_beside = is_beside
        self._owner: str | None = None

    def check(self, owner: str, /) -> bool:
        with self._telling_of_the_start():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owner = owner
            mark = self._mark()
        if mark not in (None, owner):
            raise self._refused(
                "the pictures there belong to another studio's database",
                "choose another folder: the one would remove the other's pictures",
            )
        problem = write_problem(self.path)
        if problem is not None and problem not in map(os.strerror, DISK_FULL):  # a full disk is told of later
            raise self._refused(
                f"pictures cannot be written there ({problem})",
                "make it this user's, or choose another folder",
            )
        return mark is not None

    def claim(self, owner: str, newest_key: str | None, *, is_first: bool) -> None:
        if self.check(owner):
            return
        with self._telling_of_the_start():
            is_named = newest_key is not None and self.file(newest_key).is_file()
            is_unused = not any(is_key(path.name) for path in self.path.iterdir())
            if not (self._is_beside or is_named or (is_unused and is_first and newest_key is None)):
                if is_unused:
                    raise self._refused(
                        "this database's pictures are in another place",
                        "name the folder that it was started with, or its copy with all that is in it",
                    )
                raise self._refused(
                    "has pictures that this database does not know", "choose another folder, best a new one"
                )
            write_atomic(self.path / MARK, owner.encode())

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        key = new_key(name, ext)
        with _telling_of_the_disk():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return StoredBytes(key, store_atomic(self.file(key), content))

    def open(self, key: str, _asked: str | None = None, /) -> Reading:
        try:
            content = self.file(key).open("rb")
        except OSError as error:
            raise PictureGone("the picture's file is not in the studio's folder any more") from error
        return Reading(content, os.fstat(content.fileno()).st_size)

    def file(self, key: str) -> Path:
        return self.path / key

    def address(self, _key: str, /) -> str | None:
        return None

    def delete(self, key: str) -> None:
        with _telling_of_the_disk():
            self.file(key).unlink(missing_ok=True)

    def clear_unfinished(self) -> None:
        with suppress(OSError):
            if self._is_own():
                remove_temporaries(self.path)

    def remove_unnamed(self, named: Collection[str], since: float, until: float = float("inf")) -> int:
        removed = 0
        with _telling_of_the_disk():
            found = list(self.path.iterdir()) if self._is_own() else []
        for path in found:
            if path.name not in named and is_key(path.name):
                with suppress(OSError):  # one file too many harms nobody
                    if since < path.stat().st_mtime < until:
                        path.unlink()
                        removed += 1
        return removed

    def _is_own(self) -> bool:
        # Read each time: a share that is not mounted leaves another folder in its place.
        return self._owner is not None and self._mark() == self._owner

    def _mark(self) -> str | None:
        try:
            return (self.path / MARK).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _refused(self, problem: str, cure: str) -> ConfigError:
        return ConfigError(problem, cure=cure, key="--pictures", source=str(self.path))

    @contextmanager
    def _telling_of_the_start(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in DISK_FULL:
                raise StateUnavailable(
                    f"pictures cannot be written there ({error.strerror})",
                    cure="make room on its disk",
                    key="--pictures",
                    source=str(self.path),
                ) from error
            raise self._refused(
                f"cannot be used for pictures ({error.strerror})",
                "make it this user's, or choose another folder",
            ) from error


@contextmanager
def _telling_of_the_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _TROUBLES:
            raise
        raise StorageFull(f"the studio's disk takes no more data ({error.strerror})") from error
