"""What survives a crash: the job in hand, and the outbox of finished pictures.

Everything is written with fsync before the step it protects: the job is noted before the engine touches
it, and a picture is on disk before its upload starts. Only the service writes here (folder 0700). What
cannot be read back never stops the service: it is logged, and where it may hold a picture, set aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from studio_worker.files import fsync_directory, remove_temporaries, write_atomic
from studio_worker.jobs import Job, Picture

log = logging.getLogger(__name__)

POISON_CRASHES = 2
"""A job that was in hand at this many crashes is not tried again."""

_REMEMBERED_CRASHES = 200


class JobInHand:
    """The note of the job that the engine works on, and the count of crashes it was found at."""

    def __init__(self, folder: Path) -> None:
        _make_private(folder)
        self._note = folder / "job-in-hand.json"
        self._counts_path = folder / "crashes.json"
        counts = _read_json(self._counts_path) or {}
        self._counts = {job_id: count for job_id, count in counts.items() if isinstance(count, int)}

    def recover(self) -> str | None:
        """The job that was in hand when the last process died, counted as one crash; ``None`` if none was."""
        job_id = (_read_json(self._note) or {}).get("job_id")
        if not isinstance(job_id, str):
            self._clear()
            return None
        self._counts[job_id] = self._counts.pop(job_id, 0) + 1  # the latest stands last
        self._counts = dict(list(self._counts.items())[-_REMEMBERED_CRASHES:])
        write_atomic(self._counts_path, json.dumps(self._counts).encode())
        self._clear()
        return job_id

    def is_poisoned(self, job_id: str) -> bool:
        return self._counts.get(job_id, 0) >= POISON_CRASHES

    def begin(self, job: Job) -> None:
        """Note ``job`` before anything that may kill the process is done for it."""
        note = {"job_id": job.job_id, "model": job.model, "began_at": time.time()}
        write_atomic(self._note, json.dumps(note).encode())

    def end(self) -> None:
        """The job in hand has ended: its result is in the outbox, or its failure is known."""
        self._clear()

    def _clear(self) -> None:
        self._note.unlink(missing_ok=True)
        fsync_directory(self._note.parent)


@dataclass(frozen=True)
class Delivery:
    """One finished picture on its way to the studio.

    ``prompt`` travels with the upload, never to a log; ``timings_s`` are the stages so far, in seconds.
    """

    job_id: str
    model: str
    ext: str
    prompt: str
    meta: Mapping[str, Any]
    data_path: Path
    finished_at: float
    timings_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What waits in an outbox; ``oldest_at`` in Unix seconds, ``None`` where nothing waits."""

    count: int
    size_bytes: int
    oldest_at: float | None


class Outbox:
    """Finished pictures that wait for delivery, oldest first.

    A picture is two files: its bytes, and a note. The note is written last and removed first, so a note
    always has its bytes; bytes without a note are left-overs of a crash and removed at the next start.
    A note that cannot be used, or whose bytes are gone, moves with what there is to ``unreadable``, for
    a person to look at.
    """

    def __init__(self, folder: Path) -> None:
        _make_private(folder)
        self._folder = folder
        self._changed = threading.Event()
        for data in folder.glob("*.data"):
            if not data.with_suffix(".json").exists():
                data.unlink()

    def add(self, job: Job, picture: Picture, timings_s: Mapping[str, float]) -> None:
        """Keep ``picture`` until it is delivered; it is on disk for good when this returns.

        Whoever delivers is told by :meth:`wake`.
        """
        data = self._path(job.job_id, ".data")
        note = {
            "job_id": job.job_id,
            "model": job.model,
            "ext": picture.ext,
            "prompt": job.task.prompt,
            "meta": dict(picture.meta),
            "finished_at": time.time(),
            "timings_s": dict(timings_s),
        }
        text = json.dumps(note).encode()
        try:
            write_atomic(data, picture.data)
            write_atomic(self._path(job.job_id, ".json"), text)
        except OSError:
            if not self.holds(job.job_id):
                data.unlink(missing_ok=True)
            raise

    def oldest(self) -> list[Delivery]:
        """What waits, oldest first."""
        waiting = [delivery for path in self._folder.glob("*.json") if (delivery := self._read(path))]
        return sorted(waiting, key=lambda delivery: delivery.finished_at)

    def _read(self, note: Path) -> Delivery | None:
        data = note.with_suffix(".data")
        try:
            delivery = _DELIVERY.validate_python({**json.loads(note.read_text()), "data_path": data})
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

    def usage(self) -> Usage:
        """How much waits, by looking at the files alone."""
        sizes, times = [], []
        for note in self._folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # delivered meanwhile
                sizes.append(note.with_suffix(".data").stat().st_size)
                times.append(note.stat().st_mtime)
        return Usage(len(sizes), sum(sizes), min(times, default=None))

    def holds(self, job_id: str) -> bool:
        return self._path(job_id, ".json").exists()

    def remove(self, delivery: Delivery) -> None:
        """The studio has it, or has refused it for good."""
        self._path(delivery.job_id, ".json").unlink(missing_ok=True)
        fsync_directory(self._folder)
        delivery.data_path.unlink(missing_ok=True)
        self.wake()

    def wake(self) -> None:
        """Let whoever waits in :meth:`wait` look again."""
        self._changed.set()

    def wait(self, timeout_s: float | None) -> None:
        """Until something has changed since the last call, or ``timeout_s`` has passed."""
        self._changed.wait(timeout_s)
        self._changed.clear()

    def _path(self, job_id: str, suffix: str) -> Path:
        # Job ids come from the studio: they are hashed so that none can name a path.
        digest = hashlib.sha256(job_id.encode("utf-8", "surrogatepass"))
        return self._folder / (digest.hexdigest()[:32] + suffix)


_DELIVERY = TypeAdapter(Delivery)


def _facts(path: Path, **more: object) -> dict[str, object]:
    return {"op": "spool", "path": str(path), **more}


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    remove_temporaries(folder)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        log.warning("spool file is unreadable and ignored", extra=_facts(path))
        return None
    return value if isinstance(value, dict) else None
