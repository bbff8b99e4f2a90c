"""What one download wants, and who waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from studio_worker.context import carried
from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.network.urls import safe_url

Progress = Callable[[int, int | None], None]
"""Called as bytes arrive or are checked: (bytes so far, bytes in all where known)."""


@dataclass(frozen=True)
class Wanted:
    """One file: where it is had, where it goes, and what is known of it.

    ``sha256`` is lower-case hex, ``size`` exact and in bytes.
    """

    url: str
    dest: Path
    sha256: str | None = None
    size: int | None = None

    @cached_property
    def name(self) -> str:
        """``url`` as it may be told."""
        return safe_url(self.url)

    def at(self, url: str) -> Wanted:
        """The same file, had elsewhere."""
        return replace(self, url=url)

    def broken(self, what: str) -> DownloadError:
        """The error for bytes that did not come, or not as they should."""
        return DownloadError("streaming body", f"GET {self.name}: streaming body: {what}")

    def wrong_size(self, length: int | None, wanted: int | None) -> DownloadError:
        """The error for a file of another length."""
        return DownloadError(
            "size mismatch", f"GET {self.name}: size mismatch: {length} bytes instead of {wanted}"
        )


class Caller:
    """Who waits for a file: hears how far it is, and may end the work at any time.

    Args:
        name: of what is waited for.
        reading: called in the place of ``progress`` while bytes of an earlier call are read back.
    """

    def __init__(
        self,
        name: str,
        progress: Progress | None = None,
        reading: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        self.cancel = cancel or threading.Event()
        self._name = name
        # What the caller says then is not about this file alone.
        self._progress = carried(progress or _unheard)
        self._reading = carried(reading) if reading else self._progress

    def moved(self, done: int, total: int | None) -> None:
        """So many bytes are here. Raises DownloadCancelled."""
        self._progress(done, total)
        self._go_on()

    def read_back(self, done: int, total: int | None) -> None:
        """So many bytes of an earlier call are read. Raises DownloadCancelled."""
        self._reading(done, total)
        self._go_on()

    def _go_on(self) -> None:
        if self.cancel.is_set():
            raise DownloadCancelled(self._name)


def _unheard(done: int, total: int | None) -> None:
    """The progress callback of a caller who does not look."""
