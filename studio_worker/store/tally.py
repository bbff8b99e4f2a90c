"""The progress of several files as one sum, for whoever waits for all of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from studio_worker.models import ModelFile
from studio_worker.transfer.wanted import Progress


class FileWatch(Protocol):
    """Who wants to know about each file by itself; called from several threads."""

    def moved(self, file: ModelFile, done: int, total: int | None) -> None: ...
    def reading(self, file: ModelFile, done: int, total: int | None) -> None: ...
    def verified(self, file: ModelFile, size_bytes: int) -> None: ...


class Tally:
    """Adds up the progress of several files; each of them has its own ``Progress``.

    Args:
        progress: gets the sum.
        reading: gets it while nothing comes and files on disk are read back.
    """

    def __init__(
        self,
        files: Sequence[ModelFile],
        progress: Progress | None,
        reading: Progress | None,
        watch: FileWatch | None,
    ) -> None:
        self._totals = {_key(file): file.approx_bytes for file in files}
        self._done = dict.fromkeys(self._totals, 0)
        self._coming: set[tuple[str, str]] = set()
        self._progress = progress
        self._reading = reading
        self._watch = watch
        self._lock = threading.Lock()

    def of(self, file: ModelFile) -> Progress:
        """The progress of ``file``, as the download of it reports it."""

        def moved(done: int, total: int | None) -> None:
            if self._watch is not None:
                self._watch.moved(file, done, total)
            self._coming.add(_key(file))
            self._moved(file, done, total, is_whole=False)

        return moved

    def reading(self, file: ModelFile) -> Progress:
        """The progress of ``file`` while it is read back."""

        def moved(done: int, total: int | None) -> None:
            if self._watch is not None:
                self._watch.reading(file, done, total)
            self._coming.discard(_key(file))
            self._moved(file, done, total, is_whole=False)

        return moved

    def verified(self, file: ModelFile, size_bytes: int) -> None:
        """``file`` is here; what its source said of its size no longer counts."""
        if self._watch is not None:
            self._watch.verified(file, size_bytes)
        self._coming.discard(_key(file))
        if _key(file) in self._done:
            self._moved(file, size_bytes, size_bytes, is_whole=True)

    def _moved(self, file: ModelFile, done: int, total: int | None, *, is_whole: bool) -> None:
        key = _key(file)
        with self._lock:
            known = self._totals.get(key)
            self._done[key] = done
            self._totals[key] = total if is_whole or known is None else max(known, total or 0)
            totals = list(self._totals.values())
            whole = None if None in totals else sum(each or 0 for each in totals)
            tell = self._progress if self._coming or is_whole else self._reading
            if tell is not None:
                tell(sum(self._done.values()), whole)


def _key(file: ModelFile) -> tuple[str, str]:
    return file.sha256 or file.url, file.filename
