"""Room for models: what a download needs, what may be removed for it, and in which order.

Removes only what no required model names and nobody holds; the model that was used longest ago first. A
model's files are held by a shared lock on their folders, which ends with the process. Fetches nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from studio_worker.errors import StoreError
from studio_worker.models import ModelFile
from studio_worker.store.ledger import Ledger, content_key, file_name
from studio_worker.store.terms import AskTerms
from studio_worker.transfer.holding import kept_bytes, pending_bytes, staging_key

log = logging.getLogger(__name__)

SPARE_BYTES = 256 * 1024 * 1024
"""Kept free on the disk beyond what a download needs."""


@dataclass(frozen=True)
class Removal:
    """Files of one on-demand model that can go, and what that gives: by length, and of the disk."""

    model: str
    names: tuple[str, ...]
    size_bytes: int
    disk_bytes: int


class Space:
    """The room in the folder ``root``.

    Args:
        terms: asked each time for what is never removed, and for the budget.
        spare_bytes: kept free on the disk.
    """

    def __init__(
        self,
        root: Path,
        ledger: Ledger,
        terms: AskTerms,
        *,
        spare_bytes: int = SPARE_BYTES,
    ) -> None:
        self._root = root
        self._ledger = ledger
        self._spare_bytes = spare_bytes
        self._terms = terms

    # --- holding ---

    @contextlib.contextmanager
    def holding(self, contents: Iterable[str]) -> Iterator[None]:
        """While this lasts no process removes files of ``contents`` to make room."""
        with contextlib.ExitStack() as held:
            for content in sorted(set(contents)):
                held.enter_context(_held(self._root / content))
            yield

    # --- judging ---

    def is_required(self, files: Iterable[ModelFile]) -> bool:
        return self._required().issuperset(map(content_key, files))

    def shortfall_bytes(self, files: Iterable[ModelFile]) -> int:
        """How many bytes are missing to fetch ``files``, when everything that may go is gone; 0 = enough."""
        wanted = list(files)
        if not self._missing(wanted):
            return 0
        self._ledger.reload()
        removals = self._removals(wanted)
        on_disk = self._short(wanted) - sum(each.disk_bytes for each in removals)
        return max(0, on_disk, self._beyond_budget(wanted, removals))

    def make_room(self, files: Iterable[ModelFile]) -> None:
        """Remove what has to go for ``files`` to be fetched; nothing where that would not be enough.

        Raises:
            StoreError: the disk or the budget cannot hold them.
        """
        wanted = list(files)
        if not self._missing(wanted):
            return
        self._ledger.reload()
        removals = self._removals(wanted)
        self._refuse_beyond_budget(wanted, removals)
        short = self._short(wanted) - sum(each.disk_bytes for each in removals)
        if short > 0:
            raise StoreError(
                f"{self._root} needs {_gb(self._missing_bytes(wanted))} more and {_gb(short)} of it are "
                "missing; free some space or set another [models] root"
            )
        for removal in removals:
            if self._over(wanted) <= 0 and self._short(wanted) <= 0:
                return
            self.remove(removal, "room for another model")

    def trim(self) -> None:
        """Come back under the budget, where a source did not say how large its files are."""
        if self._over([]) > 0:
            for removal in self._removals([]):
                self.remove(removal, "beyond the budget")
                if self._over([]) <= 0:
                    return

    def remove_oldest(self, files: Iterable[ModelFile]) -> bool:
        """Whether something could be removed to make room for ``files``: the disk is full."""
        return any(self.remove(removal, "the disk is full") for removal in self._removals(list(files)))

    def removals(self) -> list[Removal]:
        """Every on-demand model that nobody holds, the one that was used longest ago first."""
        self._ledger.reload()
        return self._removals([])

    def remove(self, removal: Removal, reason: str) -> bool:
        """Whether the files of ``removal`` are gone now; not where somebody has taken them meanwhile."""
        with contextlib.ExitStack() as locked:
            for folder in {(self._root / name).parent for name in removal.names}:
                if not locked.enter_context(_unheld(folder)):
                    return False
            for name in removal.names:
                (self._root / name).unlink(missing_ok=True)
            # Only now: an entry without a file does no harm, a file without an entry is never removed.
            self._ledger.forget(*removal.names)
            for folder in {(self._root / name).parent for name in removal.names}:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
        log.info(
            "model removed",
            extra={"op": "store", "model": removal.model, "bytes": removal.size_bytes, "reason": reason},
        )
        return True

    # --- measuring ---

    def _required(self) -> set[str]:
        """The contents that are never removed."""
        return set(map(content_key, self._terms().required))

    def _missing(self, files: list[ModelFile]) -> dict[str, ModelFile]:
        """Which files have yet to be fetched, by content, as far as sizes are declared."""
        return {
            content_key(file): file
            for file in files
            if file.approx_bytes is not None
            and not (self._root / file_name(file)).is_file()
            and self._ledger.unchanged_in(content_key(file)) is None
        }

    def _missing_bytes(self, files: list[ModelFile]) -> int:
        """What has yet to come; bytes that wait in staging are here."""
        staging = self._root / ".staging"
        return sum(
            max(0, (file.approx_bytes or 0) - kept_bytes(staging, staging_key(file.url, file.sha256)))
            for file in self._missing(files).values()
        )

    def _short(self, files: list[ModelFile]) -> int:
        """How many bytes the disk has too little for ``files``; 0 or less = enough."""
        missing = self._missing_bytes(files)
        if not missing:
            return 0
        keys = {staging_key(file.url, file.sha256) for file in files}
        spoken_for = self._spare_bytes + pending_bytes(self._root / ".staging", keys)
        return missing + spoken_for - shutil.disk_usage(self._root).free

    def _over(self, files: list[ModelFile]) -> int:
        """By how much the budget would be exceeded with ``files``; 0 or less = not."""
        budget = self._terms().budget_bytes
        if budget is None:
            return 0
        coming = sum(file.approx_bytes or 0 for file in self._missing(files).values())
        here = {stat.st_ino: stat.st_size for stat in self._stats().values()}
        return sum(here.values()) + coming - budget

    def _beyond_budget(self, files: list[ModelFile], removals: list[Removal]) -> int:
        """What is over even when everything that may go is gone. Required models are not refused for it."""
        if self.is_required(files):
            return 0
        return max(0, self._over(files) - sum(each.size_bytes for each in removals))

    def _refuse_beyond_budget(self, files: list[ModelFile], removals: list[Removal]) -> None:
        budget = self._terms().budget_bytes
        if budget is None or not self._beyond_budget(files, removals):
            return
        need = sum(file.approx_bytes or 0 for file in {content_key(file): file for file in files}.values())
        why = f"the model needs {_gb(need)} and [models] budget_gb allows {_gb(budget)}"
        if need <= budget:
            why += ", of which required models and those in use leave too little"
        raise StoreError(f"{self._root}: {why}; raise budget_gb")

    def _stats(self) -> dict[str, os.stat_result]:
        """The files of the ledger that are on disk."""
        found = {}
        for name in self._ledger.entries:
            with contextlib.suppress(OSError):
                found[name] = (self._root / name).stat()
        return found

    def _removals(self, wanted: list[ModelFile]) -> list[Removal]:
        """What may go to make room for ``wanted``, in order. A file of several models goes with the last."""
        stats = self._stats()
        entries = self._ledger.entries
        kept = self._required() | {content_key(file) for file in wanted}
        contents = {_content(name) for name in stats} - kept
        free = {content for content in contents if _is_unheld(self._root / content)}
        # A file of which nobody noted the use is a model of its own, the oldest.
        owners = {name: dict(entries[name].models) or {name: 0.0} for name in stats}
        used_at: dict[str, float] = {}
        for models in owners.values():
            for model, at in models.items():
                used_at[model] = max(at, used_at.get(model, 0.0))
        links = Counter(stat.st_ino for stat in stats.values())
        found = []
        for model in sorted(used_at, key=lambda each: (used_at[each], each)):
            names = []
            size = disk = 0
            for name in (each for each in stats if model in owners[each] and _content(each) in free):
                del owners[name][model]
                if owners[name]:
                    continue
                names.append(name)
                links[stats[name].st_ino] -= 1
                if not links[stats[name].st_ino]:
                    size += stats[name].st_size
                    disk += stats[name].st_blocks * 512
            if names:
                found.append(Removal(model, tuple(names), size, disk))
        return found


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A shared lock on ``folder``, which is made where it is missing and removed where it stays empty."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # removed between the two steps
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or another one holds it too
            if not any(folder.iterdir()):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder.rmdir()
        os.close(descriptor)


@contextlib.contextmanager
def _unheld(folder: Path) -> Iterator[bool]:
    """Whether nobody holds ``folder``; nobody can take it while this lasts."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except OSError:  # also where the file system has no such locks: nothing is removed there
        is_ours = False
    try:
        yield is_ours
    finally:
        os.close(descriptor)


def _is_unheld(folder: Path) -> bool:
    with _unheld(folder) as is_unheld:
        return is_unheld


def _content(name: str) -> str:
    return name.partition("/")[0]


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
