"""Finished pictures that wait for delivery: on disk before their upload starts, until the studio has them.

A picture is two files: its bytes, and a note. The note is written last and removed first, so a note always
has its bytes; bytes without a note are left-overs of a crash and removed at the next start. What cannot be
used is set aside for a person to look at. A picture that the disk does not take is kept in memory, so that
a full disk loses it only together with the power.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from studio_worker.files import fsync_directory, make_private, write_atomic, write_problem
from studio_worker.jobs import Job, Picture
from studio_worker.spool.clock import OutboxClock
from studio_worker.spool.delivery import Delivery

log = logging.getLogger(__name__)

_RESERVE_BYTES = 64 * 1024 * 1024
"""With less room on the disk no job is begun: a large picture, its note and the job in hand must fit."""
_MEMORY_BYTES = 256 * 1024 * 1024
"""So much may wait in memory because the disk takes nothing."""


@dataclass(frozen=True)
class Usage:
    """What waits in an outbox; ``oldest_at`` in Unix seconds, ``None`` where nothing waits."""

    count: int
    size_bytes: int
    oldest_at: float | None


class Outbox:
    """Finished pictures that wait, oldest first. Safe from any thread.

    Args:
        folder: made where it is missing, for the service's user alone (0700).
        max_bytes: how much may wait; beyond it no job should be begun, and the oldest pictures go.
        max_age_s: how long a picture is offered to the studio. Counted is the time that a service has looked
            after the outbox, not the wall clock's: a clock that is set, or that a box without a battery
            starts in 1970, and a box that is switched off, make no picture older.
        reserve_bytes: how much room the disk must have for a job to be begun.
        clock: seconds, monotonic.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: float = float("inf"),
        max_age_s: float = float("inf"),
        reserve_bytes: int = _RESERVE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        make_private(folder)
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._reserve_bytes = reserve_bytes
        self._changed = threading.Event()
        self._guard = threading.Lock()
        self._writing = threading.Lock()  # or what is written anew for a job would go with what is gone
        self._in_memory: dict[str, Delivery] = {}
        self._gone: set[str] = set()
        for data in folder.glob("*.data"):
            if not data.with_suffix(".json").exists():
                data.unlink()
        self._clock = OutboxClock(
            folder / "age", clock, at_least_s=max((d.kept_since_s for d in self.oldest()), default=0.0)
        )

    def add(self, job: Job, picture: Picture, timings_s: Mapping[str, float]) -> None:
        """Keep ``picture`` until it is delivered; it is on disk for good when this returns.

        Where the disk does not take it, that is logged, and the picture waits in memory. Whoever delivers
        is told by :meth:`wake`.

        Raises:
            OSError: the disk does not take it, and too much waits in memory already.
        """
        delivery = Delivery(
            job_id=job.job_id,
            model=job.model,
            ext=picture.ext,
            prompt=job.task.prompt,
            meta=dict(picture.meta),
            data_path=None,
            finished_at=time.time(),
            timings_s=dict(timings_s),
            kept_since_s=self._clock.now_s(),
            in_memory=picture.data,
        )
        with self._writing:
            self._keep(delivery)
            with self._guard:
                self._gone.discard(job.job_id)

    def _keep(self, delivery: Delivery) -> None:
        try:
            self._write(delivery)
        except OSError as error:
            log.error(
                "picture cannot be written and waits in memory; make room on the disk",
                extra={
                    "op": "spool",
                    "job_id": delivery.job_id,
                    "path": str(self._folder),
                    "error": error.strerror,
                },
            )
            with self._guard:
                held = sum(len(d.in_memory) for d in self._in_memory.values())
                if held + len(delivery.in_memory) > _MEMORY_BYTES:
                    raise
                self._in_memory[delivery.job_id] = delivery

    def _write(self, delivery: Delivery) -> None:
        data, note = self._path(delivery.job_id, ".data"), self._path(delivery.job_id, ".json")
        text = delivery.note()
        try:
            write_atomic(data, delivery.in_memory, sync_folder=False)
            write_atomic(note, text)
        except OSError:
            if not note.exists():
                data.unlink(missing_ok=True)
            raise

    def oldest(self) -> list[Delivery]:
        """What waits, oldest first."""
        waiting = [delivery for path in self._folder.glob("*.json") if (delivery := self._read(path))]
        with self._guard:
            waiting = [d for d in waiting if d.job_id not in self._gone | self._in_memory.keys()]
            waiting += self._in_memory.values()
        return sorted(waiting, key=lambda delivery: (delivery.kept_since_s, delivery.finished_at))

    def catch_up(self) -> None:
        """Write what waits in memory and remove what is gone, where the disk lets it again."""
        with self._guard:
            gone, waiting = list(self._gone), list(self._in_memory.values())
        for job_id in gone:
            try:
                self._remove_again(job_id)
            except OSError:
                return  # said when it was to go; it stays hidden
        for delivery in waiting:
            try:
                self._write(delivery)
            except OSError:
                return  # said when it came; it stays in memory
            with self._guard:
                self._in_memory.pop(delivery.job_id, None)
            log.info("picture is on disk now", extra={"op": "spool", "job_id": delivery.job_id})

    def _remove_again(self, job_id: str) -> None:
        with self._writing:
            with self._guard:
                if job_id not in self._gone:  # its picture has been made anew
                    return
            self._unlink(job_id)
            with self._guard:
                self._gone.discard(job_id)

    def is_caught_up(self) -> bool:
        """Whether the disk holds what waits and nothing that is gone."""
        with self._guard:
            return not self._gone and not self._in_memory

    def only_in_memory(self) -> list[str]:
        """The jobs whose pictures would be lost with the process."""
        with self._guard:
            return list(self._in_memory)

    def expire(self) -> list[tuple[Delivery, str]]:
        """Remove what is older than the limit, then the oldest until the rest fits; each with its reason."""
        self._clock.save_now_and_then()
        dropped = []
        waiting = self.oldest()
        total = sum(delivery.size_bytes() for delivery in waiting)
        for delivery in waiting:
            waited_s = self._clock.now_s() - delivery.kept_since_s
            if waited_s > self._max_age_s:
                reason = f"it waited {waited_s / 86400:.1f} days ([state] outbox_max_days)"
            elif total > self._max_bytes:
                reason = "more pictures wait than [state] outbox_max_gb allows"
            else:
                continue
            total -= delivery.size_bytes()
            log.error(
                "picture dropped undelivered",
                extra={"op": "spool", "job_id": delivery.job_id, "model": delivery.model, "reason": reason},
            )
            self.remove(delivery)
            dropped.append((delivery, reason))
        return dropped

    def fullness(self) -> str | None:
        """Why no further picture has room, in a few words; ``None`` = it has."""
        if self.only_in_memory():
            return "a finished picture waits that the disk does not take"
        usage = self.usage()
        if usage.size_bytes >= self._max_bytes:
            return f"{usage.count} finished pictures wait for delivery"
        try:
            room = os.statvfs(self._folder)
        except OSError as error:
            return f"the disk for finished pictures cannot be asked: {error.strerror}"
        if room.f_bavail * room.f_frsize < self._reserve_bytes:
            return "the disk for finished pictures is full"
        if problem := write_problem(self._folder):
            return f"the folder for finished pictures takes nothing: {problem}"
        return None

    def usage(self) -> Usage:
        """How much waits, by looking at the files alone."""
        sizes, times = [], []
        for note in self._folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # delivered meanwhile
                sizes.append(note.with_suffix(".data").stat().st_size)
                times.append(note.stat().st_mtime)
        with self._guard:
            sizes += [len(delivery.in_memory) for delivery in self._in_memory.values()]
            times += [delivery.finished_at for delivery in self._in_memory.values()]
        return Usage(len(sizes), sum(sizes), min(times, default=None))

    def holds(self, job_id: str) -> bool:
        with self._guard:
            if job_id in self._in_memory:
                return True
            if job_id in self._gone:
                return False
        return self._path(job_id, ".json").exists()

    def remove(self, delivery: Delivery) -> None:
        """The studio has it, or has refused it for good. A disk that lets nothing go is logged."""
        with self._guard:
            self._in_memory.pop(delivery.job_id, None)
        try:
            self._unlink(delivery.job_id)
        except OSError as error:
            with self._guard:
                self._gone.add(delivery.job_id)
            log.error(
                "delivered picture cannot be removed; that is tried again",
                extra={"op": "spool", "job_id": delivery.job_id, "error": error.strerror},
            )

    def _unlink(self, job_id: str) -> None:
        self._path(job_id, ".json").unlink(missing_ok=True)
        fsync_directory(self._folder)
        self._path(job_id, ".data").unlink(missing_ok=True)

    def wake(self) -> None:
        """Let whoever waits in :meth:`wait` look again."""
        self._changed.set()

    def wait(self, timeout_s: float | None) -> None:
        """Until something has changed since the last call, or ``timeout_s`` has passed."""
        self._changed.wait(timeout_s)
        self._changed.clear()

    def _read(self, note: Path) -> Delivery | None:
        data = note.with_suffix(".data")
        try:
            delivery = Delivery.read_note(note.read_text(), data)
        except FileNotFoundError:
            return None  # delivered meanwhile
        except OSError as error:  # this time; it may be readable the next
            log.error("picture cannot be read", extra=_facts(note, error=error.strerror))
            return None
        except (ValueError, TypeError) as error:
            self._set_aside(note, type(error).__name__)
            return None
        if self._path(delivery.job_id, ".json") != note:
            self._set_aside(note, "it names another job")
            return None
        if not data.exists():
            if note.exists():
                self._set_aside(note, "its bytes are gone")
            return None
        return delivery

    def _set_aside(self, note: Path, problem: str) -> None:
        aside = self._folder / "unreadable"
        log.error(
            "picture cannot be delivered and is set aside",
            extra=_facts(note, error=problem, to=str(aside)),
        )
        # On a full or failing disk it stays, and is passed over.
        with contextlib.suppress(OSError):
            aside.mkdir(mode=0o700, exist_ok=True)
            # The bytes first: without their note the next start would take them for a left-over.
            for path in (note.with_suffix(".data"), note):
                if path.exists():
                    path.replace(aside / path.name)

    def _path(self, job_id: str, suffix: str) -> Path:
        # Job ids come from the studio: they are hashed so that none can name a path.
        digest = hashlib.sha256(job_id.encode("utf-8", "surrogatepass"))
        return self._folder / (digest.hexdigest()[:32] + suffix)


def _facts(path: Path, **more: object) -> dict[str, object]:
    return {"op": "spool", "path": str(path), **more}
