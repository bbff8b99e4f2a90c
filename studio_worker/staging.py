"""Bytes on their way: a file and a note for each download, kept when the process ends before them.

One process at a time holds them; the lock ends with it, however it ends. Decides nothing about when kept
bytes are of use; refuses to give a file its final name other than by a rename of what is on disk for good.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from studio_worker.files import fsync_directory

Progress = Callable[[int, int | None], None]
"""Called as bytes arrive or are checked: (bytes so far, bytes in all where known)."""

_READ_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Origin:
    """Where kept bytes come from: the note beside them.

    ``validator`` goes into ``If-Range``; ``total`` is the length of the whole file; ``boot`` is the boot of
    this machine they were written in, because a power cut may leave a file of the right length with wrong
    bytes in it.
    """

    url: str
    validator: str | None = None
    total: int | None = None
    boot: str = ""


class Staged:
    """The kept bytes of one download, open and locked; made by :func:`hold`."""

    def __init__(self, part: Path, file: IO[bytes]) -> None:
        self._part = part
        self._note = part.with_suffix(".json")
        self._file = file
        self._digest = hashlib.sha256()
        self.origin = self._read_origin()
        self.length = os.fstat(file.fileno()).st_size

    def hash_kept(self, progress: Progress) -> None:
        """Read what an earlier process has kept, so that the final hash covers it."""
        self._digest = hashlib.sha256()
        self._file.seek(0)
        self.length = hash_into(self._digest, self._file, progress)

    def append(self, chunk: bytes) -> None:
        """Write ``chunk`` behind the others."""
        rest = memoryview(chunk)
        while rest:  # an unbuffered file may take less than it is given
            rest = rest[self._file.write(rest) :]
        self._digest.update(chunk)
        self.length += len(chunk)

    def hexdigest(self) -> str:
        """The SHA-256 of everything so far."""
        return self._digest.hexdigest()

    def note(self, origin: Origin) -> None:
        """Remember where the bytes come from, before they come."""
        if origin != self.origin:
            # No fsync: a note that a power cut takes or tears is one that is not trusted.
            temporary = self._note.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(origin)))
            temporary.replace(self._note)
            self.origin = origin

    def discard(self) -> None:
        """Forget the bytes, keep the hold."""
        self._file.truncate(0)
        self._file.seek(0)
        self._digest = hashlib.sha256()
        self.length = 0
        self._forget_origin()

    def drop(self) -> None:
        """Remove the bytes and the hold."""
        self._part.unlink(missing_ok=True)
        self._forget_origin()

    def commit(self, dest: Path) -> None:
        """Give the bytes their final name, for good."""
        os.fsync(self._file.fileno())
        self._part.replace(dest)
        fsync_directory(dest.parent)
        self._forget_origin()

    def _forget_origin(self) -> None:
        self.origin = None
        for path in (self._note, self._note.with_suffix(".tmp")):
            path.unlink(missing_ok=True)

    def _read_origin(self) -> Origin | None:
        try:
            origin = Origin(**json.loads(self._note.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return origin if isinstance(origin.validator, str | None) else None


@contextlib.contextmanager
def hold(folder: Path, key: str, dest: Path, waiting: Callable[[int], None]) -> Iterator[Staged | None]:
    """The kept bytes of ``key``, for this process alone; ``None`` = another one has just made them ``dest``.

    Args:
        waiting: called with the length so far, again and again, while another process holds them; it does
            the waiting, and may raise to end it.
    """
    part = folder / f"{key}.part"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # another process has removed the empty folder between the two steps
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            while not _lock(file):
                waiting(os.fstat(file.fileno()).st_size)
            if _names(part, file):
                yield Staged(part, file)
                return
            if _names(dest, file):
                yield None
                return


def staging_key(url: str, sha256: str | None) -> str:
    """What the kept bytes of a download are called: by their content, or where that is unknown by URL."""
    return sha256 or hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def kept_bytes(folder: Path, key: str) -> int:
    """How many bytes of ``key`` are on disk already."""
    try:
        return (folder / f"{key}.part").stat().st_size
    except OSError:
        return 0


def boot_id() -> str:
    """Changes with every boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def hash_into(digest: hashlib._Hash, file: IO[bytes], progress: Progress) -> int:
    """Feed the rest of ``file`` to ``digest``; returns how many bytes that were."""
    total = os.fstat(file.fileno()).st_size
    done = 0
    while chunk := file.read(_READ_BYTES):
        digest.update(chunk)
        done += len(chunk)
        progress(done, total)
    return done


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(path: Path, file: IO[bytes]) -> bool:
    """Whether ``path`` is a name of the open ``file`` (its last holder may have renamed or removed it)."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
