"""The job in hand, as a crash leaves it, and how often a job was found so.

A job is noted on disk before the engine touches it. A note that the next start finds means that the process
ended without the job's end: killed, out of memory, the watchdog at a step that never returned, a power cut.
Each counts as one crash of that job, and two are enough. A job that failed, was handed back or was stopped
for a slow step has ended, and counts nothing. With several lanes there is a note for each; where some jobs
had come to the device and others only waited, those that waited are not to blame.

Only the service writes here (folder 0700). What cannot be read back never stops it: it is logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.files import make_private, write_atomic, write_problem
from studio_worker.jobs import Job
from studio_worker.spool.notes import REMEMBERED_JOBS, read_note

log = logging.getLogger(__name__)

_NAME = "job-in-hand"

POISON_CRASHES = 2
"""A job that was in hand at this many crashes is not tried again."""


class JobInHand:
    """The notes of the jobs that are worked on, one a lane, and the crashes they were found at.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        make_private(folder)
        self._folder = folder
        self._guard = threading.Lock()  # asked for a problem while a job begins
        self._of_ended: set[int] = set()
        """Lanes whose note the disk did not let go of."""
        self._crashes_path = folder / "crashes.json"
        self._streak_path = folder / "crashes-in-a-row.json"
        crashes = read_note(self._crashes_path) or {}
        self._crashes = {job_id: notes for job_id, notes in crashes.items() if _are_names(notes)}
        self.crashes_in_a_row = _count((read_note(self._streak_path) or {}).get("count"))
        """How many processes, up to the last one, died in a job without having ended another one."""

    def of_lane(self, lane: int) -> LaneInHand:
        """The note of one lane."""
        return LaneInHand(self, lane)

    def recover(self) -> list[str]:
        """The jobs that were in hand when the last process died, each counted as one crash."""
        lanes = sorted(lane for path in self._folder.glob(f"{_NAME}*.json") if (lane := _lane_of(path)))
        notes = {lane: note for lane in lanes if (note := self._read(lane))}
        blamed = {lane: note for lane, note in notes.items() if self._mark(lane).exists()} or notes
        for note in blamed.values():
            # A note is counted once, also where this very step is interrupted and comes again.
            counted = [*self._crashes.pop(note["job_id"], []), str(note.get("note_id", ""))]
            self._crashes[note["job_id"]] = list(dict.fromkeys(counted))[-POISON_CRASHES:]  # the latest last
        if blamed:
            self._crashes = dict(list(self._crashes.items())[-REMEMBERED_JOBS:])
            self.crashes_in_a_row += 1
            try:
                write_atomic(self._crashes_path, json.dumps(self._crashes).encode())
                write_atomic(self._streak_path, json.dumps({"count": self.crashes_in_a_row}).encode())
            except OSError as error:  # a full disk must not keep the service from delivering what lies on it
                facts = {"op": "spool", "path": str(self._crashes_path), "error": error.strerror}
                log.error("crash cannot be noted", extra=facts)
        for lane in lanes:
            self._clear(lane)
        return [note["job_id"] for note in blamed.values()]

    def problem(self) -> str | None:
        """Why no job can be noted, in a few words, or ``None``."""
        problem = write_problem(self._folder)
        if problem is None:
            with self._guard:
                for lane in list(self._of_ended):
                    self._clear(lane)
        return None if problem is None else f"the folder for the job in hand takes nothing: {problem}"

    def is_poisoned(self, job_id: str) -> bool:
        return len(self._crashes.get(job_id, ())) >= POISON_CRASHES

    def begin(self, job: Job, lane: int = 1) -> None:
        """Note ``job`` before anything that may kill the process is done for it. Raises OSError."""
        note = {
            "job_id": job.job_id,
            "model": job.model,
            "began_at": time.time(),
            "note_id": uuid.uuid4().hex,
        }
        with self._guard:
            self._mark(lane).unlink(missing_ok=True)
            write_atomic(self._path(lane), json.dumps(note).encode())
            self._of_ended.discard(lane)

    def at_device(self, lane: int = 1) -> None:
        """The job in hand has come to the device: what ends the process from now on may be its doing."""
        with contextlib.suppress(OSError):  # then it shares the blame with those that only wait
            self._mark(lane).touch()

    def end(self, lane: int = 1) -> None:
        """The job in hand has ended: its result is in the outbox, or its failure is known."""
        with self._guard:
            self._clear(lane)
        if self.crashes_in_a_row:
            self.crashes_in_a_row = 0
            with contextlib.suppress(OSError):  # a disk that takes nothing: some crashes too many are counted
                self._streak_path.unlink(missing_ok=True)

    def _path(self, lane: int) -> Path:
        return self._folder / f"{_NAME}{'' if lane == 1 else f'-{lane}'}.json"

    def _mark(self, lane: int) -> Path:
        """Not synced: it tells what a dead process did, and a power cut is nobody's doing."""
        return self._path(lane).with_suffix(".at-device")

    def _read(self, lane: int) -> dict[str, Any] | None:
        note = read_note(self._path(lane)) or {}
        return note if isinstance(note.get("job_id"), str) else None

    def _clear(self, lane: int) -> None:
        path = self._path(lane)
        try:
            # Not synced: between two jobs the device waits for it. The next note syncs the folder, and a
            # power cut before that counts one crash too many of a job that has ended.
            path.unlink(missing_ok=True)
            self._mark(lane).unlink(missing_ok=True)
            self._of_ended.discard(lane)
        except OSError as error:
            self._of_ended.add(lane)
            facts = {"op": "spool", "path": str(path), "error": error.strerror}
            log.error("note of the job in hand stays", extra=facts)


@dataclass(frozen=True)
class LaneInHand:
    """One lane's note among those of ``notes``."""

    notes: JobInHand
    lane: int

    def begin(self, job: Job) -> None:
        """As :meth:`JobInHand.begin`."""
        self.notes.begin(job, self.lane)

    def at_device(self) -> None:
        """As :meth:`JobInHand.at_device`."""
        self.notes.at_device(self.lane)

    def end(self) -> None:
        """As :meth:`JobInHand.end`."""
        self.notes.end(self.lane)


def poisoned_jobs(folder: Path) -> list[str]:
    """The jobs that are not tried again, the latest last; changes nothing. Raises PermissionError."""
    path = folder / "crashes.json"
    crashes = (read_note(path) or {}) if path.exists() else {}
    return [job for job, notes in crashes.items() if _are_names(notes) and len(notes) >= POISON_CRASHES]


def _lane_of(path: Path) -> int | None:
    number = path.stem.removeprefix(_NAME).removeprefix("-") or "1"
    return int(number) if number.isdecimal() else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 1_000_000 else 0


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
