"""Finished pictures that wait for delivery: on disk before their upload starts, until the studio has them.

A picture that the disk does not take is kept in memory, so that a full disk loses it only together with the
power. Owns which pictures wait, and for how long; what becomes of their files is picture_files.py's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from studio_worker.context import called
from studio_worker.jobs import Job, Picture
from studio_worker.spool.clock import OutboxClock
from studio_worker.spool.delivery import Delivery
from studio_worker.spool.picture_files import PictureFiles

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
        max_bytes: how much may wait; beyond it no job should be begun. What was begun before may exceed it by
            the reserve of each lane; only beyond that the oldest pictures go.
        max_age_s: how long a picture is offered to the studio. Counted is the time that a service has looked
            after the outbox, not the wall clock's: a clock that is set, or that a box without a battery
            starts in 1970, and a box that is switched off, make no picture older.
        reserve_bytes: how much room the disk must have, for each lane, for a job to be begun.
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
        self._files = PictureFiles(folder)
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._reserve_bytes = reserve_bytes
        self._guard = threading.Lock()
        self._writing = threading.Lock()  # or what is written anew for a job would go with what is gone
        self._in_memory: dict[str, Delivery] = {}
        self._gone: set[str] = set()
        self._taken_over: dict[str, int] = {}
        self.lanes: set[int] = {1}
        """Those that run here: what belongs to another one is nobody's."""
        self._files.remove_left_over()
        self._clock = OutboxClock(
            folder / "age", clock, at_least_s=max((d.kept_since_s for d in self.oldest()), default=0.0)
        )

    def add(self, job: Job, picture: Picture, timings_s: Mapping[str, float], lane: int = 1) -> None:
        """Keep ``picture`` until ``lane`` has delivered it; it is on disk for good when this returns.

        Where the disk does not take it, that is logged, and the picture waits in memory.

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
            lane=lane,
            in_memory=picture.data,
        )
        with self._writing:
            self._keep(delivery)
            with self._guard:
                self._gone.discard(job.job_id)
                self._taken_over.pop(job.job_id, None)

    def _keep(self, delivery: Delivery) -> None:
        try:
            self._files.write(delivery)
        except OSError as error:
            log.error(
                "picture cannot be written and waits in memory; make room on the disk",
                extra={"op": "spool", "path": str(self._files.folder), "error": error.strerror},
            )
            with self._guard:
                held = sum(len(d.in_memory) for d in self._in_memory.values())
                if held + len(delivery.in_memory) > _MEMORY_BYTES:
                    raise
                self._in_memory[delivery.job_id] = delivery

    def oldest(self) -> list[Delivery]:
        """What waits, oldest first."""
        waiting = self._files.read_all()
        with self._guard:
            waiting = [d for d in waiting if d.job_id not in self._gone | self._in_memory.keys()]
            waiting += self._in_memory.values()
            waiting = [replace(d, lane=self._taken_over.get(d.job_id, d.lane)) for d in waiting]
        return sorted(waiting, key=lambda delivery: (delivery.kept_since_s, delivery.finished_at))

    def lane_of(self, job_id: str) -> int | None:
        """Whose picture of this job waits; ``None`` where none does."""
        delivery = self._found(job_id)
        return None if delivery is None else delivery.lane

    def take_over(self, job_id: str, lane: int) -> None:
        """From now on ``lane`` delivers this job's picture: the studio expects it of that one."""
        delivery = self._found(job_id)
        if delivery is None or delivery.lane == lane:
            return
        with self._guard:
            self._taken_over[job_id] = lane
        with self._writing, contextlib.suppress(OSError):  # then this holds until the next start
            self._files.write_note(replace(delivery, lane=lane))

    def _found(self, job_id: str) -> Delivery | None:
        """What waits of this job, without a look at the others."""
        with self._guard:
            delivery, is_gone = self._in_memory.get(job_id), job_id in self._gone
        if delivery is None and not is_gone:
            delivery = self._files.read(job_id)
        if delivery is None:
            return None
        with self._guard:
            return replace(delivery, lane=self._taken_over.get(job_id, delivery.lane))

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
                self._files.write(delivery)
            except OSError:
                return  # said when it came; it stays in memory
            with self._guard:
                self._in_memory.pop(delivery.job_id, None)
            with called(job_id=delivery.job_id, model=delivery.model):
                log.info("picture is on disk now", extra={"op": "spool"})

    def _remove_again(self, job_id: str) -> None:
        with self._writing:
            with self._guard:
                if job_id not in self._gone:  # its picture has been made anew
                    return
            self._files.remove(job_id)
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

    def _reserved_bytes(self) -> int:
        """What the jobs that all lanes may have in hand need."""
        return self._reserve_bytes * len(self.lanes)

    def expire(self, lane: int = 1) -> list[tuple[Delivery, str]]:
        """Remove what is older than the limit, then the oldest until the rest fits; each with its reason.

        Of that, what is ``lane``'s, or nobody's: the others remove, and report, their own.
        """
        self._clock.save_now_and_then()
        dropped = []
        waiting = self.oldest()
        total = sum(delivery.size_bytes() for delivery in waiting)
        for delivery in waiting:
            waited_s = self._clock.now_s() - delivery.kept_since_s
            if waited_s > self._max_age_s:
                reason = f"it waited {waited_s / 86400:.1f} days ([state] outbox_max_days)"
            elif total > self._max_bytes + self._reserved_bytes():
                reason = "more pictures wait than [state] outbox_max_gb allows"
            else:
                continue
            total -= delivery.size_bytes()
            if delivery.lane != lane and delivery.lane in self.lanes:
                continue
            with called(job_id=delivery.job_id, model=delivery.model):
                log.error("picture dropped undelivered", extra={"op": "spool", "reason": reason})
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
        return self._files.disk_problem(self._reserved_bytes())

    def usage(self) -> Usage:
        """How much waits, by looking at the files alone."""
        sizes, times = self._files.sizes_and_times()
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
        return self._files.holds(job_id)

    def remove(self, delivery: Delivery) -> None:
        """The studio has it, or has refused it for good. A disk that lets nothing go is logged."""
        with self._guard:
            self._in_memory.pop(delivery.job_id, None)
            self._taken_over.pop(delivery.job_id, None)
        try:
            self._files.remove(delivery.job_id)
        except OSError as error:
            with self._guard:
                self._gone.add(delivery.job_id)
            log.error(
                "delivered picture cannot be removed; that is tried again",
                extra={"op": "spool", "error": error.strerror},
            )
