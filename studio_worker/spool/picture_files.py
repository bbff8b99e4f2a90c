"""The files of pictures that wait: for each its bytes, and a note.

The note is written last and removed first, so a note always has its bytes; bytes without a note are
left-overs of a crash and removed at the next start. What cannot be used is set aside for a person to look
at. Owns the folder; which pictures wait there, and for how long, is the outbox's to say.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path

from studio_worker.files import fsync_directory, make_private, write_atomic, write_problem
from studio_worker.spool.delivery import Delivery

log = logging.getLogger(__name__)


class PictureFiles:
    """The folder of pictures that wait.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        make_private(folder)
        self.folder = folder

    def remove_left_over(self) -> None:
        """What a crash has left of pictures whose note was not written, or was removed. Raises OSError."""
        for data in self.folder.glob("*.data"):
            if not data.with_suffix(".json").exists():
                data.unlink()

    def write(self, delivery: Delivery) -> None:
        """The picture is on disk for good when this returns. Raises OSError; nothing of it is there then."""
        data, note = self._path(delivery.job_id, ".data"), self._path(delivery.job_id, ".json")
        text = delivery.note()
        try:
            write_atomic(data, delivery.in_memory, sync_folder=False)
            write_atomic(note, text)
        except OSError:
            if not note.exists():
                data.unlink(missing_ok=True)
            raise

    def write_note(self, delivery: Delivery) -> None:
        """What is said of a picture that is here is this from now on. Raises OSError."""
        note = self._path(delivery.job_id, ".json")
        if note.exists():
            write_atomic(note, delivery.note())

    def remove(self, job_id: str) -> None:
        """Its picture is gone for good when this returns. Raises OSError."""
        self._path(job_id, ".json").unlink(missing_ok=True)
        fsync_directory(self.folder)
        self._path(job_id, ".data").unlink(missing_ok=True)

    def holds(self, job_id: str) -> bool:
        return self._path(job_id, ".json").exists()

    def read(self, job_id: str) -> Delivery | None:
        """This job's picture, where it can be delivered."""
        return self._read(self._path(job_id, ".json"))

    def read_all(self) -> list[Delivery]:
        """Every picture that can be delivered, in no order."""
        return [delivery for note in self.folder.glob("*.json") if (delivery := self._read(note))]

    def sizes_and_times(self) -> tuple[list[int], list[float]]:
        """How long each picture is, and when it came (Unix seconds), by a look at the files alone."""
        sizes, times = [], []
        for note in self.folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # delivered meanwhile
                sizes.append(note.with_suffix(".data").stat().st_size)
                times.append(note.stat().st_mtime)
        return sizes, times

    def disk_problem(self, reserve_bytes: int) -> str | None:
        """Why the disk takes no further picture of ``reserve_bytes``, in a few words; ``None`` = it does."""
        try:
            room = os.statvfs(self.folder)
        except OSError as error:
            return f"the disk for finished pictures cannot be asked: {error.strerror}"
        if room.f_bavail * room.f_frsize < reserve_bytes:
            return "the disk for finished pictures is full"
        if problem := write_problem(self.folder):
            return f"the folder for finished pictures takes nothing: {problem}"
        return None

    def _read(self, note: Path) -> Delivery | None:
        data = note.with_suffix(".data")
        try:
            delivery = Delivery.read_note(note.read_text(), data)
        except FileNotFoundError:
            return None  # delivered meanwhile
        except OSError as error:  # this time; it may be readable the next
            facts = {"op": "spool", "path": str(note), "error": error.strerror}
            log.error("picture cannot be read", extra=facts)
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
        aside = self.folder / "unreadable"
        log.error(
            "picture cannot be delivered and is set aside",
            extra={"op": "spool", "path": str(note), "error": problem, "to": str(aside)},
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
        return self.folder / (digest.hexdigest()[:32] + suffix)
