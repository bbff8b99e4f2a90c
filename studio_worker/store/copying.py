"""A file to another place on this machine, hashed on the way; blocks or inode are shared where possible."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from studio_worker.errors import StoreError
from studio_worker.files import DISK_FULL

Told = Callable[[int], None]
"""Called as bytes are read, with how many that were so far."""

_READ_BYTES = 1024 * 1024
_FICLONE = 0x40049409
"""The ioctl that makes a file share another's blocks (ioctl_ficlone(2))."""


@contextlib.contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A name in ``folder`` that is free, and is free again in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def is_ours(path: Path, root: Path) -> bool:
    """Whether a link to ``path`` belongs into ``root``; a stranger could change its own file later."""
    with contextlib.suppress(OSError):
        return path.stat().st_uid == root.stat().st_uid
    return False


def bring(source: Path, dest: Path, told: Told | None, *, may_link: bool) -> str:
    """``source`` as ``dest``, sharing its blocks or its inode where that is possible; returns its hash."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StoreError(f"{source} is not a plain file")
        if not _is_shared(opened, source, dest, may_link=may_link):
            return copy(opened, dest, told)
    with dest.open("rb") as shared:
        reader = HashingReader(shared, told)
        while reader.read(_READ_BYTES):
            pass
    return reader.digest.hexdigest()


def _is_shared(opened: IO[bytes], source: Path, dest: Path, *, may_link: bool) -> bool:
    with dest.open("xb") as made, contextlib.suppress(OSError):  # another file system, or one that cannot
        fcntl.ioctl(made, _FICLONE, opened.fileno())
        return True
    dest.unlink()
    if may_link:
        with contextlib.suppress(OSError):
            os.link(source, dest, follow_symlinks=False)
            return True
    return False


def copy(source: IO[bytes], dest: Path, told: Told | None) -> str:
    """Write what ``source`` still gives to the new file ``dest``; returns its hash."""
    reader = HashingReader(source, told)
    try:
        with dest.open("xb", buffering=0) as made:
            fcntl.flock(made, fcntl.LOCK_EX)  # nobody takes it for an abandoned one
            while chunk := reader.read(_READ_BYTES):
                rest = memoryview(chunk)
                while rest:  # an unbuffered file may take less than it is given
                    rest = rest[made.write(rest) :]
            os.fsync(made.fileno())
    except OSError as error:
        if error.errno in DISK_FULL:
            raise StoreError(f"{dest.parent}: no space left on the disk; free some and try again") from error
        raise
    return reader.digest.hexdigest()


class HashingReader:
    """Hashes what is read through it."""

    def __init__(self, source: IO[bytes], told: Told | None) -> None:
        self.digest = hashlib.sha256()
        self._source = source
        self._told = told
        self._done = 0

    def read(self, size: int = -1) -> bytes:
        chunk = self._source.read(size)
        self.digest.update(chunk)
        self._done += len(chunk)
        if chunk and self._told is not None:
            self._told(self._done)
        return chunk
