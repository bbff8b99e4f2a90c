"""Bytes on their way: a file and its notes for each download, kept when the process ends before them.

Decides nothing about when kept bytes are of use; refuses to give a file its final name other than by a
rename of what is on disk for good. That one process at a time has them is holding.py's to see to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from studio_worker.files import copy_atomic, fsync_directory, read_plain
from studio_worker.transfer.spans import BLOCK_BYTES, BlockMap, Spans
from studio_worker.transfer.wanted import Progress

_READ_BYTES = 1024 * 1024
_FRESH_BYTES = 3 * 1024 * 1024
"""Two of the largest reads: one is hashed, one waits."""
_PATIENCE_S = 0.25
"""So long is the hashing waited for before it has to read back what it did not take from memory."""


@dataclass(frozen=True)
class Origin:
    """Where kept bytes come from.

    ``validator`` goes into ``If-Range``; ``total`` is the length of the whole file.
    """

    url: str
    validator: str | None = None
    total: int | None = None


class Staged:
    """The kept bytes of one download, open and locked; made by :func:`studio_worker.transfer.holding.hold`.

    Bytes come one behind the other (:meth:`append`), or, after :meth:`split`, at any place from several
    threads (:meth:`write_at`); then a map on disk says which are there. A note beside them tells their origin
    and the boot of this machine in which they were written: a power cut may leave wrong bytes in a file of
    the right length, so of another boot only what was synced is believed.
    """

    def __init__(self, part: Path, file: IO[bytes]) -> None:
        self._part = part
        self._note = part.with_suffix(".json")
        self._map_path = part.with_suffix(".map")
        self._file = file
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)
        self._spans = Spans()
        self._map: BlockMap | None = None
        self._fresh: deque[memoryview] = deque()
        """What has come behind all that is hashed, still in memory: reading it back would cost a copy."""
        self._fresh_bytes = self._fresh_end = 0
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._durable: list[tuple[int, int]] = []
        self._reset_hash()
        self.origin: Origin | None = None
        self._read_kept(os.fstat(file.fileno()).st_size)

    @property
    def length(self) -> int:
        """How many bytes are there from the first one on, without a gap."""
        return self._spans.end_from(0)

    @property
    def kept(self) -> int:
        """How many bytes are there."""
        return self._spans.total

    @property
    def is_split(self) -> bool:
        """Whether bytes may come at any place."""
        return self._map is not None

    def missing(self, total: int) -> list[tuple[int, int]]:
        """The ranges that are not there."""
        with self._lock:
            return list(self._spans.gaps(total))

    def gap_end(self) -> int | None:
        """Where the first gap ends, if bytes follow it."""
        return self._spans.start_after(self.length)

    def hash_kept(self, progress: Progress) -> None:
        """Read what an earlier process has kept, so that the final hash covers it."""
        self._reset_hash()
        while self.hash_more():
            progress(self.hashed, self.kept)

    def hash_more(self, *, patience_s: float = 0.0) -> int:
        """Hash on, a megabyte at most; returns how many bytes that were, 0 where the next is not there.

        Args:
            patience_s: so long is the next one waited for.
        """
        with self._lock:
            if patience_s and not self._fresh and self._spans.end_from(self.hashed) == self.hashed:
                self._moved.wait(patience_s)
            fresh = self._fresh.popleft() if self._fresh else None
            if fresh is not None:
                self._fresh_bytes -= len(fresh)
                self._moved.notify_all()
            else:
                count = min(self._spans.end_from(self.hashed) - self.hashed, len(self._buffer))
                self._fresh_end = self.hashed + count
        if fresh is not None:
            chunk = fresh
        else:
            chunk = self._buffer[: os.preadv(self._file.fileno(), [self._buffer[:count]], self.hashed)]
            if len(chunk) < count:
                raise OSError(errno.EIO, "bytes that were written are gone", str(self._part))
        self._digest.update(chunk)
        self.hashed += len(chunk)
        return len(chunk)

    def split(self, total: int) -> None:
        """From now on bytes come at any place of a file of ``total`` bytes."""
        if self._map is None:
            self._map = BlockMap.create(self._map_path, self._spans, total)
        self._fresh_end = self.hashed

    def check_room(self, total: int) -> None:
        """Whether the disk can take what is missing of ``total`` bytes. Raises OSError (ENOSPC)."""
        missing = total - self.kept
        free = shutil.disk_usage(self._part.parent).free
        if missing > free:
            what = f"{missing / 1e6:.1f} MB are missing and {free / 1e6:.1f} MB are free"
            raise OSError(errno.ENOSPC, what, str(self._part.parent))

    def append(self, chunk: bytes) -> None:
        """Write ``chunk`` behind the others and hash it."""
        assert self._map is None
        at = self.length
        self._write(chunk, at)
        self._spans.add(at, at + len(chunk))
        if self.hashed == at:
            self._digest.update(chunk)
            self.hashed += len(chunk)

    def write_at(self, chunk: bytes | memoryview, at: int) -> None:
        """Write ``chunk`` at its place; from any thread."""
        assert self._map is not None
        self._write(chunk, at)
        with self._lock:
            start, end = self._spans.add(at, at + len(chunk))
            self._map.mark(max(start, at - BLOCK_BYTES), min(end, at + len(chunk) + BLOCK_BYTES))
            if at == self._fresh_end and self._fresh_bytes > _FRESH_BYTES:
                self._moved.wait(_PATIENCE_S)
            if at == self._fresh_end and self._fresh_bytes <= _FRESH_BYTES:
                self._fresh.append(memoryview(chunk))
                self._fresh_bytes += len(chunk)
                self._fresh_end = at + len(chunk)
                self._moved.notify_all()

    def _write(self, chunk: bytes | memoryview, at: int) -> None:
        rest = memoryview(chunk)
        while rest:  # a write may take less than it is given
            written = os.pwrite(self._file.fileno(), rest, at)
            rest, at = rest[written:], at + written

    def hexdigest(self) -> str:
        """The SHA-256 of everything from the first byte to the first gap."""
        while self.hash_more():
            pass
        return self._digest.hexdigest()

    def note(self, origin: Origin) -> None:
        """Remember where the bytes come from, before they come."""
        if origin != self.origin:
            with self._lock:
                self.origin = origin
                self._write_note()

    def sync(self) -> None:
        """Make what is there outlast a power cut; may take as long as the disk needs."""
        with self._lock:
            kept = self._spans
            durable = list(kept)
        os.fdatasync(self._file.fileno())
        with self._lock:
            # Neither renamed nor removed meanwhile, nor another process's by now.
            if self._spans is kept and self.origin is not None and not self._file.closed:
                self._durable = durable
                self._write_note()

    def discard(self) -> None:
        """Forget the bytes, keep the hold."""
        self._file.truncate(0)  # first: no map is believed beyond the file's length
        self._spans = Spans()
        self._reset_hash()
        self._forget()

    def drop(self) -> None:
        """Remove the bytes and the hold."""
        self._part.unlink(missing_ok=True)
        self._forget()

    def commit(self, dest: Path) -> None:
        """Give the bytes their final name, for good."""
        os.fsync(self._file.fileno())
        try:
            self._part.replace(dest)
        except OSError as error:
            if error.errno != errno.EXDEV:  # else the staging folder is on another file system
                raise
            copy_atomic(self._part, dest)
            self._part.unlink()
        fsync_directory(dest.parent)
        self._forget()

    def close(self) -> None:
        """Let go of what is open beside the file."""
        if self._map is not None:
            self._map.close()

    @property
    def path(self) -> Path:
        """Where the bytes are."""
        return self._part

    def _reset_hash(self) -> None:
        self._digest = hashlib.sha256()
        self._fresh.clear()
        self._fresh_bytes = self._fresh_end = 0
        self.hashed = 0
        """How far the bytes are hashed."""

    def _forget(self) -> None:
        self.close()
        with self._lock:
            self._map = None
            self.origin = None
            self._durable = []
            for path in (self._map_path, self._note):
                path.unlink(missing_ok=True)
                path.with_suffix(path.suffix + ".tmp").unlink(missing_ok=True)

    def _write_note(self) -> None:
        # No fsync: a note that a power cut takes or tears is one that is not trusted.
        assert self.origin is not None
        note = {**asdict(self.origin), "boot": _boot_id(), "durable": self._durable}
        temporary = self._note.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(note))
        temporary.replace(self._note)

    def _read_kept(self, size: int) -> None:
        """Find out what is there, as far as it can be believed."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(read_plain(self._note))
            origin = Origin(note["url"], note["validator"], note["total"])
            if isinstance(origin.validator, str | None):
                self.origin = origin
                self._read_spans(size, note)
        if not self._spans:
            self.discard()

    def _read_spans(self, size: int, note: dict[str, Any]) -> None:
        assert self.origin is not None
        total = self.origin.total
        if note["boot"] != _boot_id():
            self._durable = [(start, min(end, size)) for start, end in note["durable"]]
            if isinstance(total, int):
                self._spans = Spans(self._durable)
                self._map = BlockMap.create(self._map_path, self._spans, total)
        elif not self._map_path.exists():  # the bytes came one behind the other
            self._spans = Spans([(0, size)])
        elif isinstance(total, int):
            self._map = BlockMap(self._map_path, total)
            self._spans = self._map.spans(size)


def _boot_id() -> str:
    """Changes with every boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
