"""The models on disk: every file of a model there and verified, or an error that says why not.

Layout below ``[models] root``: ``<content>/<filename>``, where ``content`` is the file's sha256 (or a key
of its URL where the registry knows no hash), so that two models which share a file share it on disk;
``.staging`` for bytes on their way; ``ledger.json`` for what was verified. A file in the ledger whose
size, mtime and inode are unchanged is trusted and not read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from studio_worker.download import Policy, Progress, ensure_file, hash_file
from studio_worker.errors import StoreError
from studio_worker.files import remove_temporaries, write_atomic
from studio_worker.logs import safe_url
from studio_worker.models import LocalFile, ModelFile

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
        self._ledger_path = root / "ledger.json"
        self._guard = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
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
            StoreError: the disk has not enough room.
        """
        wanted = list(files)
        self._check_space([file for file in wanted if not self.is_verified(file)])
        return tuple(self._ensure_one(file, progress, cancel) for file in wanted)

    def is_verified(self, file: ModelFile) -> bool:
        """Whether ``file`` is on disk, unchanged since it was verified. Reads no content."""
        entry = self._ledger.get(self._name(file))
        return entry is not None and (file.sha256 in {None, entry.sha256}) and self._unchanged(file, entry)

    def path(self, file: ModelFile) -> Path:
        """Where ``file`` is, or would be."""
        return self._root / _content(file) / file.filename

    def shortfall_bytes(self, files: Iterable[ModelFile]) -> int:
        """How many bytes of disk are missing to fetch what of ``files`` is not here yet; 0 = enough."""
        missing = sum(file.approx_bytes or 0 for file in files if not self.is_verified(file))
        if not missing:
            return 0
        return max(0, missing + _SPARE_BYTES - shutil.disk_usage(self._root).free)

    def verify(self, progress: Progress | None = None) -> Iterator[Checked]:
        """Read every file of the ledger and compare; what is damaged is removed, to be fetched anew."""
        for name, entry in sorted(self._ledger.items()):
            path = self._root / name
            if not path.is_file():
                self._forget(name)
                yield Checked(path, "missing", 0)
            elif hash_file(path, progress) != entry.sha256:
                path.unlink()
                self._forget(name)
                yield Checked(path, "damaged", entry.size)
            else:
                self._remember(name, path, entry.sha256, entry.url)
                yield Checked(path, "verified", entry.size)

    def _ensure_one(
        self, file: ModelFile, progress: Progress | None, cancel: threading.Event | None
    ) -> LocalFile:
        path = self.path(file)
        if not self.is_verified(file):
            ensure_file(
                path.parent,
                file,
                staging=self._root / ".staging",
                progress=progress,
                cancel=cancel,
                policy=self._policy,
            )
            self._remember(self._name(file), path, file.sha256 or hash_file(path), safe_url(file.url))
        return LocalFile(file.role, path, _content(file))

    def _check_space(self, missing: list[ModelFile]) -> None:
        if short := self.shortfall_bytes(missing):
            need = sum(file.approx_bytes or 0 for file in missing)
            raise StoreError(
                f"{self._root} needs {need / 1e9:.1f} GB more and {short / 1e9:.1f} GB of it are missing; "
                "free some space or set another [models] root"
            )

    # --- the ledger ---

    def _name(self, file: ModelFile) -> str:
        return f"{_content(file)}/{file.filename}"

    def _unchanged(self, file: ModelFile, entry: Verified) -> bool:
        try:
            stat = self.path(file).stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns, stat.st_ino) == (entry.size, entry.mtime_ns, entry.inode)

    def _remember(self, name: str, path: Path, sha256: str, url: str) -> None:
        stat = path.stat()
        with self._guard:
            self._ledger[name] = Verified(stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256, url)
            self._write_ledger()

    def _forget(self, name: str) -> None:
        with self._guard:
            self._ledger.pop(name, None)
            self._write_ledger()

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

    def _write_ledger(self) -> None:
        text = json.dumps({name: asdict(entry) for name, entry in self._ledger.items()}, indent=1)
        write_atomic(self._ledger_path, text.encode(), mode=0o644)


def _content(file: ModelFile) -> str:
    return file.sha256 or "url-" + hashlib.sha256(file.url.encode()).hexdigest()
