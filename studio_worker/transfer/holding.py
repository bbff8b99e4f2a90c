"""Who has the kept bytes of a download: one process at a time; its lock ends with it, however it ends.

Knows what they are called in the staging folder, and how much of it the downloads there will still need.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import IO

from studio_worker.files import open_plain
from studio_worker.transfer.policy import Policy
from studio_worker.transfer.staging import Staged
from studio_worker.transfer.wanted import Caller, Wanted

_LOOK_AGAIN_S = 0.2


@contextlib.contextmanager
def hold(folder: Path, wanted: Wanted, caller: Caller, policy: Policy) -> Iterator[Staged | None]:
    """The kept bytes of ``wanted``, for this process alone; another one that has them is waited for.

    ``None`` = that one has just made them the file that is wanted.

    Raises:
        DownloadError: the other process brings nothing.
    """
    part = folder / f"{staging_key(wanted.url, wanted.sha256)}.part"
    other = _Other(wanted, caller, policy)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = open_plain(part, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # another process has removed the empty folder between the two steps
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            while not _lock(file):
                other.await_more(os.fstat(file.fileno()))
            if _names(part, file):
                with contextlib.closing(Staged(part, file)) as staged:
                    yield staged
                return
            if _names(wanted.dest, file):
                yield None
                return


class _Other:
    """Another process at the same download, which is waited for as long as it brings something: one that
    hangs must not be waited for as if it worked.
    """

    def __init__(self, wanted: Wanted, caller: Caller, policy: Policy) -> None:
        self._wanted = wanted
        self._caller = caller
        self._policy = policy
        self._last: tuple[int, int] | None = None
        self._waited_s = 0.0

    def await_more(self, found: os.stat_result) -> None:
        """A while. Raises DownloadError where it was too long without anything new."""
        if self._last != (found.st_size, found.st_mtime_ns):
            self._last, self._waited_s = (found.st_size, found.st_mtime_ns), 0.0
        if self._waited_s >= self._policy.other_s:
            raise self._wanted.broken(
                f"another process has this download, and brought nothing for {self._policy.other_s:g} s"
            )
        self._caller.moved(found.st_size, self._wanted.size)
        self._policy.wait(self._caller.cancel, _LOOK_AGAIN_S)
        self._waited_s += _LOOK_AGAIN_S


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
