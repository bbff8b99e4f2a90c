"""The models on disk: every file of a model there and verified, or an error that says why not.

Layout below ``[models] root``: ``<content>/<filename>``, where ``content`` is the file's sha256 (or a key
of its URL where the registry knows no hash), so that two models which share a file share it on disk, under
two names by a hard link; ``.staging`` for bytes on their way; ``ledger.json`` for what was verified. A file
in the ledger whose size, mtime and inode are unchanged is trusted and not read again. Several processes
may use one folder at once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from studio_worker.errors import StoreError
from studio_worker.files import fsync_directory
from studio_worker.models import LocalFile, ModelFile
from studio_worker.store.checking import Checked, Checker, OnDamage
from studio_worker.store.fetching import Fetcher
from studio_worker.store.ledger import Ledger, Verified, content_key, file_name, is_verified
from studio_worker.store.leftovers import find_staging, find_strangers, remove_abandoned, remove_staging
from studio_worker.store.previews import Previews
from studio_worker.store.space import SPARE_BYTES, Removal, Space
from studio_worker.store.tally import FileWatch, Tally
from studio_worker.store.terms import AskTerms, fixed
from studio_worker.transfer.holding import staging_key
from studio_worker.transfer.wanted import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What ``models prune`` removes (or would): on-demand models and downloads nobody goes on with.

    ``strangers`` are files that it does not know and leaves alone.
    """

    models: tuple[Removal, ...]
    staging_bytes: int
    strangers: tuple[Path, ...]


class Store:
    """The models folder of this box.

    Args:
        root: made where missing.
        terms: asked each time; downloads under way go on by those that they began with.
        spare_bytes: kept free on the disk beyond what a download needs.
        clock: seconds since the epoch, for the last use of models.
    """

    def __init__(
        self,
        root: Path,
        terms: AskTerms | None = None,
        *,
        spare_bytes: int = SPARE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self._staging = root / ".staging"
        self._terms = terms or fixed()
        self._clock = clock
        with store_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            self._ledger = Ledger(root)
        self._checker = Checker(root, self._ledger)
        self._space = Space(root, self._ledger, self._terms, spare_bytes=spare_bytes)
        self._fetcher = Fetcher(root, self._ledger, self._space, self._terms)
        self.previews = Previews(
            self._terms, lambda file: self.path(file) if self.is_verified(file) else None
        )

    def ensure(
        self,
        files: Iterable[ModelFile],
        *,
        model: str | None = None,
        progress: Progress | None = None,
        reading: Progress | None = None,
        watch: FileWatch | None = None,
        cancel: threading.Event | None = None,
    ) -> tuple[LocalFile, ...]:
        """Every one of ``files`` on disk and verified; what is missing is downloaded, several at once.

        Args:
            model: the model that they are; it is noted with them.
            progress: gets the sum of what has come.
            reading: gets it in its place while only files on disk are read back.
            watch: gets each file by itself.

        Raises:
            DownloadError: a file could not be fetched or does not match its hash.
            StoreError: the disk or the budget has not enough room, or the disk cannot be read or written.
        """
        wanted = list(files)
        with store_errors(self.root), self._space.holding(map(content_key, wanted)):
            local = self._ensure_held(wanted, progress, reading, watch, cancel)
            if model is not None:
                self._note_use(
                    model, [name for name in map(file_name, wanted) if model not in self._models_of(name)]
                )
            return local

    @contextlib.contextmanager
    def taken(
        self,
        model: str,
        files: Iterable[ModelFile],
        *,
        progress: Progress | None = None,
        reading: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[tuple[LocalFile, ...]]:
        """As :meth:`ensure`, for a job: a use of ``model`` is noted, and no process removes it meanwhile."""
        wanted = list(files)
        with contextlib.ExitStack() as held:
            with store_errors(self.root):
                held.enter_context(self._space.holding(map(content_key, wanted)))
                local = self._ensure_held(wanted, progress, reading, None, cancel)
            self._note_use(model, [file_name(file) for file in wanted])
            yield local

    def is_verified(self, file: ModelFile) -> bool:
        """Whether ``file`` is on disk, unchanged since it was verified. Reads no content."""
        return is_verified(self._ledger, file)

    def path(self, file: ModelFile) -> Path:
        """Where ``file`` is, or would be."""
        return self.root / file_name(file)

    def entries(self) -> dict[str, Verified]:
        """What the ledger knows, by the files' names below the folder."""
        with store_errors(self.root):
            return self._ledger.reload()

    def shortfall_bytes(self, files: Iterable[ModelFile]) -> int:
        """How many bytes are missing to fetch what of ``files`` is not here yet; 0 = enough.

        What on-demand models take that may be removed for it is not missing.
        """
        return self._space.shortfall_bytes(files)

    def verify(
        self, progress: Progress | None = None, *, on_damage: OnDamage = "remove"
    ) -> Iterator[Checked]:
        """Read every file of the ledger and compare.

        Args:
            on_damage: ``remove`` what is damaged, to be fetched anew when it is needed; ``repair`` it now,
                where it is required (only the configuration says where a file is to be had; what the folder
                itself says of that may be somebody else's word), and remove the rest; or ``leave`` everything
                as it is.

        Raises:
            StoreError: the folder cannot be written.
        """
        urls = {file_name(file): file.url for file in self._terms().required}
        for name, entry in sorted(self._ledger.entries.items()):
            url = urls.get(name)
            fetch = partial(self._fetcher.fetch_again, name, entry, progress)
            with store_errors(self.root), self._space.holding([name.partition("/")[0]]):
                checked = self._checker.check(
                    name,
                    entry,
                    on_damage=on_damage,
                    progress=progress,
                    fetch_again=None if url is None else partial(fetch, url),
                )
            yield checked

    def is_as_registered(
        self, path: Path, progress: Progress | None = None, cancel: threading.Event | None = None
    ) -> bool:
        """Whether the file at ``path``, which makes no sense, is as it was registered: it is read anew, and
        removed where this disk has changed it.

        Raises:
            DownloadCancelled: ``cancel`` was set.
            StoreError: the folder cannot be written, or the file not be read.
        """
        name = path.relative_to(self.root).as_posix()
        entry = self._ledger.get(name)
        if entry is None or entry.sha256 != name.partition("/")[0]:  # its source says no hash: nobody knows
            return False
        with store_errors(self.root), self._space.holding([entry.sha256]):
            checked = self._checker.check(name, entry, on_damage="remove", progress=progress, cancel=cancel)
        if checked.state == "unreadable":
            raise StoreError(f"{path}: {checked.error}")
        if not checked.is_right:
            log.warning("file is damaged", extra={"op": "store", "dest": str(path)})
        return checked.is_right

    def prune(self, *, dry_run: bool = False) -> Pruned:
        """Remove the on-demand models that nobody holds, and downloads that nobody goes on with.

        What has come of a required model's files is kept for a while.
        """
        with store_errors(self.root):
            removals = self._space.removals()
            going = [each for each in removals if dry_run or self._space.remove(each, "prune")]
            kept = {staging_key(file.url, file.sha256) for file in self._terms().required}
            staged = [each for each in find_staging(self._staging) if each.key not in kept]
            freed = sum(each.size_bytes for each in staged if dry_run or remove_staging(each))
            if not dry_run:
                self.clean_staging()
                gone = [name for name in self._ledger.entries if not (self.root / name).exists()]
                if gone:
                    self._ledger.forget(*gone)
            known = {*self._ledger.entries, *(file_name(file) for file in self._terms().required)}
            return Pruned(tuple(going), freed, tuple(find_strangers(self.root, known)))

    def clean_staging(self) -> None:
        """Remove the bytes of downloads that nobody has gone on with for two weeks."""
        with store_errors(self.root):
            remove_abandoned(self._staging)

    def holds(self, name: str, sha256: str) -> bool:
        """Whether the file ``name`` is here, verified to hash to ``sha256``. Reads no content."""
        entry = self._ledger.get(name)
        return entry is not None and entry.sha256 == sha256 and self._ledger.is_unchanged(name)

    @contextlib.contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """While this lasts no process removes the files ``names``."""
        with self._space.holding(name.partition("/")[0] for name in names):
            yield

    def adopt(self, name: str, temporary: Path, sha256: str, url: str, models: Iterable[str]) -> None:
        """Give ``temporary``, which the caller has verified to hash to ``sha256``, the name ``name``."""
        path = self.root / name
        with self.holding([name]):
            temporary.replace(path)
            fsync_directory(path.parent)
            self._ledger.remember(name, sha256, url, dict.fromkeys(models, self._clock()))

    def make_room(self, files: Iterable[ModelFile]) -> None:
        """Remove on-demand models until ``files`` have room.

        Raises:
            StoreError: that is not enough.
        """
        self._space.make_room(files)

    # --- one call of ensure ---

    def _ensure_held(
        self,
        wanted: list[ModelFile],
        progress: Progress | None,
        reading: Progress | None,
        watch: FileWatch | None,
        cancel: threading.Event | None,
    ) -> tuple[LocalFile, ...]:
        missing = [file for file in wanted if not self.is_verified(file)]
        if watch is not None:
            for file in (each for each in wanted if each not in missing):
                watch.verified(file, self.path(file).stat().st_size)
        if missing:
            remove_abandoned(self._staging)  # the service may run for months
            self._space.make_room(wanted)
            tally = Tally(missing, progress, reading, watch)
            self._fetcher.fetch(missing, wanted, tally, cancel)
            self._space.trim()
        return tuple(LocalFile(file.role, self.path(file), content_key(file)) for file in wanted)

    def _note_use(self, model: str, names: list[str]) -> None:
        try:
            self._ledger.note_use(model, names, self._clock())
        except OSError as error:  # a full disk: the files are here all the same
            log.warning("use of a model not noted", extra={"op": "store", "error": str(error)})

    def _models_of(self, name: str) -> Iterable[str]:
        entry = self._ledger.get(name)
        return entry.models if entry is not None else ()


@contextlib.contextmanager
def store_errors(root: Path) -> Iterator[None]:
    """What the file system refuses is an error of the store, with the path in its text."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error.filename or root}: {error.strerror or error}") from error
