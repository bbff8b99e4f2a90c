"""The models on disk: every file of a model there and verified, or an error that says why not.

Layout below ``[models] root``: ``<content>/<filename>``, where ``content`` is the file's sha256 (or a key
of its URL where the registry knows no hash), so that two models which share a file share it on disk, under
two names by a hard link; ``.staging`` for bytes on their way; ``ledger.json`` for what was verified. A file
in the ledger whose size, mtime and inode are unchanged is trusted and not read again. Several processes
may use one folder at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from studio_worker.download import Policy, Progress, ensure_file, hash_file
from studio_worker.errors import StoreError
from studio_worker.files import fsync_directory, remove_temporaries, write_atomic
from studio_worker.logs import safe_url
from studio_worker.models import LocalFile, ModelFile
from studio_worker.staging import kept_bytes, staging_key

log = logging.getLogger(__name__)

_SPARE_BYTES = 256 * 1024 * 1024
"""Kept free on the disk beyond what a download needs."""


@dataclass(frozen=True)
class Verified:
    """A ledger entry: what the file looked like when it was last verified."""

    size: int
    mtime_ns: int
    inode: int
    sha256: str
    url: str


@dataclass(frozen=True)
class Checked:
    """One line of ``models verify``; ``state`` is ``verified`` or ``damaged`` or ``missing``."""

    path: Path
    state: str
    size_bytes: int


class Store:
    """The models folder of this box.

    Args:
        root: made where missing.
        policy: how patient downloads are, and which addresses they may use.
    """

    def __init__(self, root: Path, policy: Policy | None = None) -> None:
        self._root = root
        self._policy = policy or Policy()
        self._staging = root / ".staging"
        self._ledger_path = root / "ledger.json"
        with _store_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            with self._ledger_locked():
                remove_temporaries(root)
                self._ledger = self._read_ledger()

    def ensure(
        self,
        files: Iterable[ModelFile],
        *,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> tuple[LocalFile, ...]:
        """Every one of ``files`` on disk and verified; what is missing is downloaded.

        Raises:
            DownloadError: a file could not be fetched or does not match its hash.
            StoreError: the disk has not enough room, or cannot be read or written.
        """
        wanted = list(files)
        with _store_errors(self._root):
            self._check_space(wanted)
            return tuple(self._ensure_one(file, progress, cancel) for file in wanted)

    def is_verified(self, file: ModelFile) -> bool:
        """Whether ``file`` is on disk, unchanged since it was verified. Reads no content."""
        entry = self._ledger.get(_name(file))
        return (
            entry is not None
            and file.sha256 in {None, entry.sha256}
            and _is_unchanged(self.path(file), entry)
        )

    def path(self, file: ModelFile) -> Path:
        """Where ``file`` is, or would be."""
        return self._root / _content(file) / file.filename

    def shortfall_bytes(self, files: Iterable[ModelFile]) -> int:
        """How many bytes of disk are missing to fetch what of ``files`` is not here yet; 0 = enough."""
        missing = self._missing_bytes(files)
        if not missing:
            return 0
        return max(0, missing + _SPARE_BYTES - shutil.disk_usage(self._root).free)

    def verify(self, progress: Progress | None = None) -> Iterator[Checked]:
        """Read every file of the ledger and compare; what is damaged is removed, to be fetched anew.

        Raises:
            StoreError: the folder cannot be written.
        """
        for name, entry in sorted(self._ledger.copy().items()):
            path = self._root / name
            with _store_errors(self._root):
                checked = self._verify_one(name, path, entry, progress)
            yield checked

    def _verify_one(self, name: str, path: Path, entry: Verified, progress: Progress | None) -> Checked:
        if not path.is_file():
            self._forget(name)
            return Checked(path, "missing", 0)
        try:
            is_right = hash_file(path, progress=progress) == entry.sha256
        except OSError:  # the disk cannot read it back
            is_right = False
        if is_right:
            self._remember(name, path, entry.sha256, entry.url)
            return Checked(path, "verified", entry.size)
        self._forget(name)
        path.unlink(missing_ok=True)
        return Checked(path, "damaged", entry.size)

    def _ensure_one(
        self, file: ModelFile, progress: Progress | None, cancel: threading.Event | None
    ) -> LocalFile:
        path = self.path(file)
        self._drop_changed(file, progress, cancel)
        if not self.is_verified(file) and not self._link_twin(file):
            ensure_file(
                path.parent,
                file,
                staging=self._staging,
                progress=progress,
                cancel=cancel,
                policy=self._policy,
            )
            sha256 = file.sha256 or hash_file(path, progress=progress, cancel=cancel)
            self._remember(_name(file), path, sha256, safe_url(file.url))
        return LocalFile(file.role, path, _content(file))

    def _drop_changed(
        self, file: ModelFile, progress: Progress | None, cancel: threading.Event | None
    ) -> None:
        """Remove a file whose source names no hash and which is not what the ledger once verified."""
        path = self.path(file)
        entry = self._ledger.get(_name(file))
        if file.sha256 is not None or entry is None or not path.is_file() or self.is_verified(file):
            return
        if hash_file(path, progress=progress, cancel=cancel) != entry.sha256:
            log.warning("cached file is damaged", extra={"op": "store", "dest": str(path)})
            path.unlink(missing_ok=True)

    def _link_twin(self, file: ModelFile) -> bool:
        """Whether the same content was here under another name; it has this one too then."""
        path = self.path(file)
        twin = self._twin(file)
        if twin is None or path.exists():
            return False
        try:
            os.link(twin, path)
        except OSError:  # a file system without hard links: it is fetched a second time
            return False
        fsync_directory(path.parent)
        self._remember(
            _name(file), path, self._ledger[str(twin.relative_to(self._root))].sha256, safe_url(file.url)
        )
        return True

    def _twin(self, file: ModelFile) -> Path | None:
        """A verified file of the same content under another name."""
        for name, entry in self._ledger.copy().items():
            path = self._root / name
            if path.parent == self.path(file).parent and _is_unchanged(path, entry):
                return path
        return None

    def _missing_bytes(self, files: Iterable[ModelFile]) -> int:
        """What has yet to be fetched, as far as sizes are declared; bytes that wait in staging are not."""
        missing: dict[str, int] = {}
        for file in files:
            path = self.path(file)
            if file.approx_bytes is None or self.is_verified(file) or path.is_file() or self._twin(file):
                continue
            here = kept_bytes(self._staging, staging_key(file.url, file.sha256))
            missing[_content(file)] = max(0, file.approx_bytes - here)
        return sum(missing.values())

    def _check_space(self, files: list[ModelFile]) -> None:
        if short := self.shortfall_bytes(files):
            need = self._missing_bytes(files)
            raise StoreError(
                f"{self._root} needs {need / 1e9:.1f} GB more and {short / 1e9:.1f} GB of it are missing; "
                "free some space or set another [models] root"
            )

    # --- the ledger ---

    def _remember(self, name: str, path: Path, sha256: str, url: str) -> None:
        stat = path.stat()
        self._change(name, Verified(stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256, url))

    def _forget(self, name: str) -> None:
        self._change(name, None)

    def _change(self, name: str, entry: Verified | None) -> None:
        """Change one entry, and learn what other processes have written since."""
        with self._ledger_locked():
            ledger = self._read_ledger()
            ledger.pop(name, None)
            if entry is not None:
                ledger[name] = entry
            text = json.dumps({name: asdict(entry) for name, entry in ledger.items()}, indent=1)
            write_atomic(self._ledger_path, text.encode(), mode=0o644)
            self._ledger = ledger

    @contextlib.contextmanager
    def _ledger_locked(self) -> Iterator[None]:
        with (self._root / ".ledger.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read_ledger(self) -> dict[str, Verified]:
        try:
            raw = json.loads(self._ledger_path.read_text())
            return {name: Verified(**entry) for name, entry in raw.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError):
            # Nothing is lost: what stands in no ledger is hashed again.
            log.warning("ledger is unreadable", extra={"op": "store", "path": str(self._ledger_path)})
            return {}


def _content(file: ModelFile) -> str:
    return file.sha256 or "url-" + hashlib.sha256(file.url.encode()).hexdigest()


def _name(file: ModelFile) -> str:
    return f"{_content(file)}/{file.filename}"


def _is_unchanged(path: Path, entry: Verified) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns, stat.st_ino) == (entry.size, entry.mtime_ns, entry.inode)


@contextlib.contextmanager
def _store_errors(root: Path) -> Iterator[None]:
    """What the file system refuses is an error of the store, with the path in its text."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error.filename or root}: {error.strerror or error}") from error
