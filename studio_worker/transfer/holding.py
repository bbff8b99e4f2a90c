"""Who has the kept bytes of a download: one process at a time; its lock ends with it, however it ends.

Knows what they are called in the staging folder, and how much of it the downloads there will still need.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import IO

from studio_worker.files import open_plain
from studio_worker.transfer.staging import Staged


@contextlib.contextmanager
def hold(
    folder: Path, key: str, dest: Path, waiting: Callable[[os.stat_result], None]
) -> Iterator[Staged | None]:
    """The kept bytes of ``key``, for this process alone; ``None`` = another one has just made them ``dest``.

    Args:
        waiting: called with the state of the file, again and again, while another process holds it; it does
            the waiting, and may raise to end it.
    """
    part = folder / f"{key}.part"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = open_plain(part, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # another process has removed the empty folder between the two steps
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            while not _lock(file):
                waiting(os.fstat(file.fileno()))
            if _names(part, file):
                with contextlib.closing(Staged(part, file)) as staged:
                    yield staged
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
        found = (folder / f"{key}.part").stat()
        has_gaps = (folder / f"{key}.map").exists()
        return min(found.st_size, found.st_blocks * 512) if has_gaps else found.st_size
    except OSError:
        return 0


def pending_bytes(folder: Path, but: Set[str]) -> int:
    """What the downloads that are under way in ``folder``, ``but`` those keys, have yet to write."""
    pending = 0
    for note in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if note.stem not in but and not _is_free(note.with_suffix(".part")):
                pending += max(0, json.loads(note.read_text())["total"] - kept_bytes(folder, note.stem))
    return pending


def _is_free(part: Path) -> bool:
    with part.open("rb") as file:
        return _lock(file)


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
