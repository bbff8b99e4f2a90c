"""The missing files of one model onto the disk: linked where their content is here, downloaded where not.

Decides in which order, how many at once, what a damaged file on disk means, and what becomes of a download
that fills the disk. The caller holds the files. Its threads do not keep the process alive, so that a stop is
never stuck behind a stalled mirror.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from studio_worker.download import ensure_file, hash_file
from studio_worker.errors import DownloadError, StoreError
from studio_worker.files import DISK_FULL, fsync_directory
from studio_worker.models import ModelFile
from studio_worker.network.urls import safe_url
from studio_worker.store.at_once import do_all
from studio_worker.store.ledger import Ledger, Verified, content_key, file_name, is_verified
from studio_worker.store.leftovers import find_staging, remove_staging
from studio_worker.store.space import Space
from studio_worker.store.tally import Tally
from studio_worker.store.terms import AskTerms
from studio_worker.transfer.holding import staging_key
from studio_worker.transfer.wanted import Progress

log = logging.getLogger(__name__)

_AT_ONCE = 3
_BRIM_BYTES = 64 * 1024 * 1024
"""With less than this the disk is so full that the service cannot work beside it."""


class Fetcher:
    """Fetches into the folder ``root``; notes what it has verified in ``ledger``."""

    def __init__(self, root: Path, ledger: Ledger, space: Space, terms: AskTerms) -> None:
        self._terms = terms
        self._root = root
        self._ledger = ledger
        self._space = space
        self._staging = root / ".staging"

    def fetch(
        self,
        missing: list[ModelFile],
        wanted: list[ModelFile],
        tally: Tally,
        cancel: threading.Event | None,
    ) -> None:
        """Every file of ``missing``, several at once; other models go where the disk becomes full.

        Args:
            wanted: the whole model.

        Raises:
            DownloadError: a file could not be fetched or does not match its hash.
            StoreError: the disk is full.
        """
        by_content: dict[str, list[ModelFile]] = {}
        for file in missing:  # names of one content one after the other: the second is a link to the first
            by_content.setdefault(content_key(file), []).append(file)

        def task(same: list[ModelFile]) -> Callable[[threading.Event], None]:
            def work(stop: threading.Event) -> None:
                for file in same:
                    self._ensure_one(file, tally, stop)

            return work

        while True:
            try:
                at_once = min(_AT_ONCE, self._terms().policy.connections.most)
                do_all([task(same) for same in by_content.values()], cancel, at_once)
                return
            except (DownloadError, OSError) as error:
                if not _is_disk_full(error):
                    raise
                if not self._space.remove_oldest(wanted):
                    raise self._disk_full(missing) from error

    def _disk_full(self, files: list[ModelFile]) -> StoreError:
        """The disk became full on the way. Leaves it usable for everything else on this box."""
        outcome = "what has come is kept, and the next try goes on from there"
        if not self._space.is_required(files) and shutil.disk_usage(self._root).free < _BRIM_BYTES:
            keys = {staging_key(file.url, file.sha256) for file in files}
            for leftover in find_staging(self._staging):
                if leftover.key in keys:
                    remove_staging(leftover)
            outcome = "what had come was removed, because nothing else on this disk could work"
        return StoreError(
            f"{self._root}: no space left on the disk for a download; free some space or set "
            f"another [models] root ({outcome})"
        )

    def _ensure_one(self, file: ModelFile, tally: Tally, cancel: threading.Event) -> None:
        path = self._root / file_name(file)
        if path.exists() and not os.access(path, os.R_OK, effective_ids=True):
            # No damage: it may be all right, and stays.
            raise PermissionError(
                errno.EACCES, "cannot be read by this user; give the service's user access to it", str(path)
            )
        reading = tally.reading(file)
        self._drop_changed(file, reading, cancel)
        if not is_verified(self._ledger, file) and not self._link_twin(file):
            ensure_file(
                path.parent,
                file,
                staging=self._staging,
                progress=tally.of(file),
                reading=reading,
                cancel=cancel,
                policy=self._terms().policy_for(file.url),
            )
            sha256 = file.sha256 or hash_file(path, progress=reading, cancel=cancel)
            self._ledger.remember(file_name(file), sha256, safe_url(file.url))
        tally.verified(file, path.stat().st_size)

    def _drop_changed(self, file: ModelFile, reading: Progress, cancel: threading.Event) -> None:
        """Remove a file whose source names no hash and which is not what the ledger once verified."""
        path = self._root / file_name(file)
        entry = self._ledger.get(file_name(file))
        if file.sha256 is not None or entry is None or not path.is_file() or is_verified(self._ledger, file):
            return
        if hash_file(path, progress=reading, cancel=cancel) != entry.sha256:
            log.warning("cached file is damaged", extra={"op": "store", "dest": str(path)})
            path.unlink(missing_ok=True)

    def _link_twin(self, file: ModelFile) -> bool:
        """Whether the same content was here under another name; it has this one too then."""
        path = self._root / file_name(file)
        twin = self._ledger.unchanged_in(content_key(file))
        if twin is None or path.exists():
            return False
        try:
            os.link(self._root / twin, path)
        except OSError:  # a file system without hard links: it is fetched a second time
            return False
        fsync_directory(path.parent)
        self._ledger.remember(file_name(file), self._ledger.entries[twin].sha256, safe_url(file.url))
        return True

    def fetch_again(self, name: str, entry: Verified, progress: Progress | None, url: str) -> None:
        """The file ``name`` from ``url``, if what is there is still what the ledger says."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        again = ModelFile(role="model", url=url, filename=path.name, sha256=entry.sha256)
        policy = self._terms().policy
        ensure_file(path.parent, again, staging=self._staging, progress=progress, policy=policy)
        self._ledger.remember(name, entry.sha256, safe_url(url))


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind ``error``."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if "no space left" in str(error).lower():  # whoever raised it no longer had the cause
            return True
        error = error.__cause__
    return False
