"""What is known of the files on disk: what they were when they were verified, and who used them when.

Owns ``ledger.json``: one entry a file, under its name below the models folder. Several processes may write
it at once. Reads no model file; refuses names that lead elsewhere, because files are removed by them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from studio_worker.files import open_plain, read_plain, remove_temporaries, write_atomic
from studio_worker.models import ModelFile

log = logging.getLogger(__name__)

_CONTENT = re.compile(r"(url-)?[0-9a-f]{64}")
_USE_COUNTS_AFTER_S = 60.0
"""A model used again within this time is not written down again."""


@dataclass(frozen=True)
class Verified:
    """A ledger entry: what the file looked like when it was last verified.

    ``models`` tells which models it belongs to and when each was last used, in seconds since the epoch.
    """

    size: int
    mtime_ns: int
    inode: int
    sha256: str
    url: str
    models: Mapping[str, float] = field(default_factory=dict)


class Ledger:
    """The ledger of the folder ``root``, as of the last time it was read or changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "ledger.json"
        with self._locked():
            remove_temporaries(root)
            self._entries = self._read()

    @property
    def entries(self) -> dict[str, Verified]:
        """Every entry by its name; a copy."""
        return self._entries.copy()

    def get(self, name: str) -> Verified | None:
        return self._entries.get(name)

    def reload(self) -> dict[str, Verified]:
        """Every entry, with what other processes have written since."""
        with self._locked():
            self._entries = self._read()
        return self.entries

    def remember(self, name: str, sha256: str, url: str, models: Mapping[str, float] | None = None) -> None:
        """The file ``name`` is what it should be, as it is now; it belongs to ``models`` too."""
        stat = (self._root / name).stat()

        def change(entries: dict[str, Verified]) -> None:
            before = entries.get(name)
            owners = {**(before.models if before else {}), **(models or {})}
            entries[name] = Verified(stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256, url, owners)

        self._change(change)

    def forget(self, *names: str) -> None:
        """The files ``names`` are gone, or not what they should be."""

        def change(entries: dict[str, Verified]) -> None:
            for name in names:
                entries.pop(name, None)

        self._change(change)

    def note_use(self, model: str, names: list[str], now: float) -> None:
        """``model`` is used ``now``; written only where that says something new."""

        def is_new(entry: Verified | None) -> bool:
            return entry is not None and not 0 <= now - entry.models.get(model, 0.0) < _USE_COUNTS_AFTER_S

        def change(entries: dict[str, Verified]) -> None:
            for name in names:
                if (entry := entries.get(name)) is not None:
                    entries[name] = replace(entry, models={**entry.models, model: now})

        if any(is_new(self._entries.get(name)) for name in names):
            self._change(change)

    def is_unchanged(self, name: str) -> bool:
        """Whether the file ``name`` is on disk as it was when it was verified, and can be read. Reads no
        content.
        """
        entry = self._entries.get(name)
        if entry is None:
            return False
        path = self._root / name
        try:
            stat = path.stat()
        except OSError:
            return False
        is_same = (stat.st_size, stat.st_mtime_ns, stat.st_ino) == (entry.size, entry.mtime_ns, entry.inode)
        return is_same and os.access(path, os.R_OK, effective_ids=True)

    def unchanged_in(self, content: str) -> str | None:
        """The name of a file with this content that is on disk as it was when it was verified."""
        for name in self.entries:
            if name.startswith(f"{content}/") and self.is_unchanged(name):
                return name
        return None

    def _change(self, change: Callable[[dict[str, Verified]], None]) -> None:
        """Change entries, and learn what other processes have written since."""
        with self._locked():
            entries = self._read()
            change(entries)
            text = json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=1)
            write_atomic(self._path, text.encode(), mode=0o644)
            self._entries = entries

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._root / ".ledger.lock"
        with os.fdopen(open_plain(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, Verified]:
        try:
            raw = json.loads(read_plain(self._path))
            return {name: _checked(name, Verified(**entry)) for name, entry in raw.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError):
            # Nothing is lost: what stands in no ledger is hashed again.
            log.warning("ledger is unreadable", extra={"op": "store", "path": str(self._path)})
            return {}


def content_key(file: ModelFile) -> str:
    """The folder of ``file``: its content's hash, or a key of its URL where the source knows none."""
    return file.sha256 or "url-" + hashlib.sha256(file.url.encode()).hexdigest()


def file_name(file: ModelFile) -> str:
    """The name of ``file`` below the models folder."""
    return f"{content_key(file)}/{file.filename}"


def is_verified(ledger: Ledger, file: ModelFile) -> bool:
    """Whether ``file`` is on disk, unchanged since it was verified. Reads no content."""
    name = file_name(file)
    entry = ledger.get(name)
    return entry is not None and file.sha256 in {None, entry.sha256} and ledger.is_unchanged(name)


def is_file_name(name: str) -> bool:
    """Whether ``name`` is one that :func:`file_name` makes."""
    content, _, filename = name.partition("/")
    is_plain = filename not in {"", ".", ".."} and "/" not in filename and "\0" not in filename
    return is_plain and _CONTENT.fullmatch(content) is not None


def _checked(name: str, entry: Verified) -> Verified:
    """``entry``, if a program like this one wrote it."""
    numbers = (entry.size, entry.mtime_ns, entry.inode)
    is_right = (
        is_file_name(name)
        and all(isinstance(number, int) for number in numbers)
        and isinstance(entry.sha256, str)
        and isinstance(entry.url, str)
        and all(isinstance(at, int | float) for at in entry.models.values())
    )
    if not is_right:
        raise ValueError(name)
    return entry
