"""Pictures as files of one folder, for this user alone.

A file named ``studio`` marks the folder as one database's. Where another's mark lies, or none, nothing is
ever removed unasked; in its own folder the studio removes what a crash left without a row, never what is a
person's own. A named folder whose mark is gone since the start, a share that is not mounted any more say, is
away: nothing is put there, nor missed in it.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from studio_worker.errors import StateUnavailable
from studio_worker.files import (
    DISK_FULL,
    DISK_TROUBLES,
    is_temporary,
    remove_temporaries,
    store_atomic,
    write_atomic,
    write_problem,
)
from studio_worker.local_studio.pictures.marks import Spot, Standing, standing
from studio_worker.local_studio.pictures.port import (
    MARK,
    PictureGone,
    Reading,
    StorageAway,
    StorageFull,
    StoredBytes,
    is_key,
    new_key,
)
from studio_worker.local_studio.pictures.ranges import part_of

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
        self._spot = Spot("folder", str(folder))
        self._owner: str | None = None
        self._is_marked = False

    def mark(self) -> str | None:
        with self._telling_of_the_start():
            return self._mark()

    def check(self, owner: str, /) -> bool:
        with self._telling_of_the_start():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owner = owner
            is_own = self._spot.is_own(self._mark(), owner)
        problem = write_problem(self.path)
        if problem is not None and problem not in map(os.strerror, DISK_FULL):  # a full disk is told of later
            raise self._spot.refused(
                f"pictures cannot be written there ({problem})",
                "make it this user's, or choose another folder",
            )
        self._is_marked = is_own
        return is_own

    def claim(self, owner: str, newest_key: str | None, *, is_first: bool) -> None:
        if self.check(owner):
            return
        with self._telling_of_the_start():
            if standing(self._mark(), owner) is Standing.FREE and not self._is_beside:
                self._spot.require_unclaimed(newest_key, self.has, self._is_unused, is_first)
            write_atomic(self.path / MARK, owner.encode())
        self._is_marked = True

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        key = new_key(name, ext)
        with _telling_of_the_disk():
            self._require_there()
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return StoredBytes(key, store_atomic(self.file(key), content))

    def open(self, key: str, asked: str | None = None, /) -> Reading:
        try:
            content = self._opened(key)
            size_bytes = os.fstat(content.fileno()).st_size
        except OSError as error:
            raise StorageAway(f"the studio's folder of pictures cannot be read ({error.strerror})") from error
        try:
            part = None if asked is None else part_of(asked, size_bytes)
            if part is None:
                return Reading(content, size_bytes)
            content.seek(part.start)
        except BaseException:
            content.close()
            raise
        length = part.stop - part.start
        return Reading(io.BufferedReader(_Start(content, length)), length, part.content_range(size_bytes))

    def _opened(self, key: str) -> IO[bytes]:
        try:
            return self.file(key).open("rb")
        except FileNotFoundError as error:
            self._require_there()
            raise PictureGone("the picture's file is not in the studio's folder any more") from error

    def has(self, key: str, /) -> bool:
        return self.file(key).is_file()

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
            if path.name not in named and (is_key(path.name) or is_temporary(path)):
                with suppress(OSError):  # one file too many harms nobody
                    if since < path.stat().st_mtime < until:
                        path.unlink()
                        removed += 1
        return removed

    def _require_there(self) -> None:
        # The folder beside the database is made anew where somebody took it away.
        if self._is_marked and not self._is_beside and not self._is_own():
            raise StorageAway(
                f"{self.path} is not the studio's now: not mounted, or without its file {MARK!r}"
            )

    def _is_own(self) -> bool:
        # Read each time: a share that is not mounted leaves another folder in its place.
        return self._owner is not None and standing(self._mark(), self._owner) is Standing.OWN

    def _is_unused(self) -> bool:
        return not any(is_key(path.name) for path in self.path.iterdir())

    def _mark(self) -> str | None:
        try:
            return (self.path / MARK).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

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
            raise self._spot.refused(
                f"cannot be used for pictures ({error.strerror})",
                "make it this user's, or choose another folder",
            ) from error


class _Start(io.RawIOBase):
    """So many bytes of a file, from where it stands."""

    def __init__(self, content: IO[bytes], left_bytes: int) -> None:
        self._content = content
        self._left_bytes = left_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        with memoryview(buffer) as view:
            piece = self._content.read(min(len(view), self._left_bytes))
            view[: len(piece)] = piece
        self._left_bytes -= len(piece)
        return len(piece)

    def close(self) -> None:
        self._content.close()
        super().close()


@contextmanager
def _telling_of_the_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _TROUBLES:
            raise
        raise StorageFull(f"the studio's disk takes no more data ({error.strerror})") from error
