"""What is left in the models folder that no model needs: bytes of downloads nobody goes on with, strangers.

Removes only staging that no process holds. Lists what it does not know, and leaves it alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from studio_worker.files import open_plain

log = logging.getLogger(__name__)

ABANDONED_AFTER_S = 14 * 86_400.0
_OURS = {"ledger.json", ".ledger.lock"}


@dataclass(frozen=True)
class Leftover:
    """The bytes and notes of one download in the staging folder."""

    key: str
    paths: tuple[Path, ...]
    size_bytes: int
    changed_at: float


def find_staging(staging: Path) -> list[Leftover]:
    """Every download in ``staging`` that no process holds."""
    groups: dict[str, list[Path]] = {}
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(staging.iterdir()):
            groups.setdefault(path.name.partition(".")[0], []).append(path)
    found = []
    for key, paths in groups.items():
        with _locked(paths) as is_free:
            stats = []
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    stats.append(path.stat())
            if is_free and stats:
                size = sum(stat.st_size for stat in stats)
                found.append(Leftover(key, tuple(paths), size, max(stat.st_mtime for stat in stats)))
    return found


def remove_staging(leftover: Leftover) -> bool:
    """Whether ``leftover`` is gone now; not where a process has taken it up meanwhile."""
    with _locked(leftover.paths) as is_free:
        if is_free:
            for path in leftover.paths:
                path.unlink(missing_ok=True)
    return is_free


def remove_abandoned(staging: Path, *, older_than_s: float = ABANDONED_AFTER_S) -> list[Leftover]:
    """Remove the downloads that nobody has gone on with for so long; returns them."""
    limit = time.time() - older_than_s
    removed = [each for each in find_staging(staging) if each.changed_at < limit and remove_staging(each)]
    for each in removed:
        log.info("abandoned download removed", extra={"op": "store", "bytes": each.size_bytes})
    return removed


def find_strangers(root: Path, known: Set[str]) -> list[Path]:
    """Files below ``root`` that stand in no ledger and are no download on its way."""
    found = []
    for folder, folders, names in os.walk(root):
        below = Path(folder).relative_to(root)
        if below == Path():
            folders[:] = [name for name in folders if name != ".staging"]
            names = [name for name in names if name not in _OURS]
        found += [root / below / name for name in names if str(below / name) not in known]
    return sorted(found)


@contextlib.contextmanager
def _locked(paths: list[Path] | tuple[Path, ...]) -> Iterator[bool]:
    """Whether no process holds any of ``paths``; none can while this lasts."""
    with contextlib.ExitStack() as stack:
        is_free = True
        for path in paths:
            try:
                file = stack.enter_context(os.fdopen(open_plain(path, os.O_RDONLY), "rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except OSError:
                is_free = False
        yield is_free
