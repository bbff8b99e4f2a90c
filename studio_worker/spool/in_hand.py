"""The job in hand, as a crash leaves it, and how often a job was found so.

A job is noted on disk before the engine touches it. A note that the next start finds means that the process
ended without the job's end: killed, out of memory, the watchdog at a step that never returned, a power cut.
Each counts as one crash of that job, and two are enough. A job that failed, was handed back or was stopped
for a slow step has ended, and counts nothing.

Only the service writes here (folder 0700). What cannot be read back never stops it: it is logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from studio_worker.context import called
from studio_worker.files import make_private, write_atomic, write_problem
from studio_worker.jobs import Job
from studio_worker.spool.notes import REMEMBERED_JOBS, read_note

log = logging.getLogger(__name__)

POISON_CRASHES = 2
"""A job that was in hand at this many crashes is not tried again."""


class JobInHand:
    """The note of the job that the engine works on, and the crashes it was found at.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        make_private(folder)
        self._folder = folder
        self._note = folder / "job-in-hand.json"
        self._guard = threading.Lock()  # asked for a problem while a job begins
        self._has_note_of_ended = False
        self._crashes_path = folder / "crashes.json"
        self._streak_path = folder / "crashes-in-a-row.json"
        crashes = read_note(self._crashes_path) or {}
        self._crashes = {job_id: notes for job_id, notes in crashes.items() if _are_names(notes)}
        self.crashes_in_a_row = _count((read_note(self._streak_path) or {}).get("count"))
        """How many processes, up to the last one, died in a job without having ended another one."""

    def recover(self) -> str | None:
        """The job that was in hand when the last process died, counted as one crash; ``None`` if none was."""
        note = read_note(self._note) or {}
        job_id = note.get("job_id")
        if not isinstance(job_id, str):
            self._clear()
            return None
        # A note is counted once, also where this very step is interrupted and comes again.
        notes = [*self._crashes.pop(job_id, []), str(note.get("note_id", ""))]
        self._crashes[job_id] = list(dict.fromkeys(notes))[-POISON_CRASHES:]  # the latest stands last
        self._crashes = dict(list(self._crashes.items())[-REMEMBERED_JOBS:])
        self.crashes_in_a_row += 1
        with called(job_id=job_id):
            try:
                write_atomic(self._crashes_path, json.dumps(self._crashes).encode())
                write_atomic(self._streak_path, json.dumps({"count": self.crashes_in_a_row}).encode())
            except OSError as error:  # a full disk must not keep the service from delivering what lies on it
                facts = {"op": "spool", "path": str(self._crashes_path), "error": error.strerror}
                log.error("crash cannot be noted", extra=facts)
            self._clear()
        return job_id

    def problem(self) -> str | None:
        """Why no job can be noted, in a few words, or ``None``."""
        problem = write_problem(self._folder)
        if problem is None:
            with self._guard:
                if self._has_note_of_ended:
                    self._clear()
        return None if problem is None else f"the folder for the job in hand takes nothing: {problem}"

    def is_poisoned(self, job_id: str) -> bool:
        return len(self._crashes.get(job_id, ())) >= POISON_CRASHES

    def begin(self, job: Job) -> None:
        """Note ``job`` before anything that may kill the process is done for it. Raises OSError."""
        note = {
            "job_id": job.job_id,
            "model": job.model,
            "began_at": time.time(),
            "note_id": uuid.uuid4().hex,
        }
        with self._guard:
            write_atomic(self._note, json.dumps(note).encode())
            self._has_note_of_ended = False

    def end(self) -> None:
        """The job in hand has ended: its result is in the outbox, or its failure is known."""
        with self._guard:
            self._clear()
        if self.crashes_in_a_row:
            self.crashes_in_a_row = 0
            with contextlib.suppress(OSError):  # a disk that takes nothing: some crashes too many are counted
                self._streak_path.unlink(missing_ok=True)

    def _clear(self) -> None:
        try:
            # Not synced: between two jobs the device waits for it. The next note syncs the folder, and a
            # power cut before that counts one crash too many of a job that has ended.
            self._note.unlink(missing_ok=True)
            self._has_note_of_ended = False
        except OSError as error:
            self._has_note_of_ended = True
            facts = {"op": "spool", "path": str(self._note), "error": error.strerror}
            log.error("note of the job in hand stays", extra=facts)


def poisoned_jobs(folder: Path) -> list[str]:
    """The jobs that are not tried again, the latest last; changes nothing. Raises PermissionError."""
    path = folder / "crashes.json"
    crashes = (read_note(path) or {}) if path.exists() else {}
    return [job for job, notes in crashes.items() if _are_names(notes) and len(notes) >= POISON_CRASHES]


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 1_000_000 else 0


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
