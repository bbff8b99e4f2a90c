"""``models verify``: every file of the ledger read and compared, and what is damaged mended, or only told."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from studio_worker.download import hash_file
from studio_worker.errors import DownloadError
from studio_worker.store.ledger import Ledger, Verified
from studio_worker.transfer.wanted import Progress

_BAD_SECTOR = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""What disks and file systems say of content that they cannot give back."""

OnDamage = Literal["remove", "repair", "leave"]
"""What becomes of a damaged file: gone, to be fetched when it is needed; fetched now; or left alone."""


@dataclass(frozen=True)
class Checked:
    """One line of ``models verify``; ``state`` is ``verified``, ``repaired``, ``damaged``, ``missing`` or
    ``unreadable``: nobody knows what is in it.

    ``error`` tells why that is, or why a repair failed.
    """

    path: Path
    state: str
    size_bytes: int
    error: str = ""

    @property
    def is_right(self) -> bool:
        return self.state in {"verified", "repaired"}


class Checker:
    """Reads files below ``root`` and compares them with ``ledger``."""

    def __init__(self, root: Path, ledger: Ledger) -> None:
        self._root = root
        self._ledger = ledger

    def check(
        self,
        name: str,
        entry: Verified,
        *,
        on_damage: OnDamage,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        fetch_again: Callable[[], None] | None = None,
    ) -> Checked:
        """Read the file ``name``.

        Args:
            fetch_again: brings it back, or raises DownloadError; ``None`` where nobody says from where.

        Raises:
            DownloadCancelled: ``cancel`` was set.
        """
        path = self._root / name
        state = "missing"
        if path.is_file():
            try:
                is_right = hash_file(path, progress=progress, cancel=cancel) == entry.sha256
            except OSError as error:
                # This user may not, or the network's disk is away: no damage.
                if error.errno not in _BAD_SECTOR:
                    return Checked(path, "unreadable", entry.size, f"{error.strerror}; nothing was changed")
                is_right = False
            if is_right:
                if on_damage != "leave" and not self._ledger.is_unchanged(name):
                    self._ledger.remember(name, entry.sha256, entry.url)
                return Checked(path, "verified", entry.size)
            state = "damaged"
        size = entry.size if state == "damaged" else 0
        if on_damage == "leave":
            return Checked(path, state, size)
        path.unlink(missing_ok=True)
        if on_damage == "remove" or fetch_again is None:
            self._ledger.forget(name)
            return Checked(path, state, size, "removed; the next job that needs it fetches it")
        try:
            fetch_again()
        except DownloadError as error:
            return Checked(path, state, size, str(error))
        return Checked(path, "repaired", entry.size)
