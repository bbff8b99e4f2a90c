"""The operator's pause: no jobs for now, or, by a note on disk, also after a restart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio_worker.appliance.news import News
from studio_worker.files import fsync_directory, write_atomic
from studio_worker.report.control import Handler
from studio_worker.work.desk import Desks

log = logging.getLogger(__name__)


class PauseNote:
    """Whether the service begins paused: an empty file, there or not. Only the service writes it.

    Args:
        folder: the state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "paused"

    @property
    def is_set(self) -> bool:
        return self._path.exists()

    def set(self) -> None:
        """From now on a start is a paused one. Raises OSError."""
        write_atomic(self._path, b"")

    def clear(self) -> None:
        """The next start takes jobs, if the disk lets go of the note."""
        try:
            self._path.unlink(missing_ok=True)
            fsync_directory(self._path.parent)
        except OSError as error:
            log.error(
                "note of a lasting pause stays",
                extra={"op": "pause", "path": str(self._path), "error": error.strerror},
            )


class Pausing:
    """What pauses and resumes one running service. Safe from any thread.

    Args:
        folder: the state folder.
        beat: has the studio told.
    """

    def __init__(self, desks: Desks, news: News, folder: Path, beat: Callable[[], None]) -> None:
        self._desks = desks
        self._news = news
        self._note = PauseNote(folder)
        self._beat = beat

    def begin(self) -> None:
        """Paused, where the operator wished so before the last start."""
        if self._note.is_set:
            log.warning(
                "paused since before this start", extra={"op": "pause", "cure": "studio-worker resume"}
            )
            self._desks.pause()
            self._news.paused(True)

    def handlers(self) -> dict[str, Handler]:
        """The commands for the control socket."""
        return {"pause": self._pause, "pause-lasting": self._pause_for_good, "resume": self._resume}

    def _pause(self) -> dict[str, Any]:
        self._desks.pause()
        return self._changed(is_paused=True)

    def _pause_for_good(self) -> dict[str, Any]:
        answer = self._pause()
        try:
            self._note.set()
        except OSError as error:
            return {**answer, "problem": error.strerror}
        return answer

    def _resume(self) -> dict[str, Any]:
        self._note.clear()
        self._desks.resume()
        return self._changed(is_paused=False)

    def _changed(self, *, is_paused: bool) -> dict[str, Any]:
        self._news.paused(is_paused)
        self._beat()
        phase = self._news.activity.phase
        in_hand = self._desks.current_job_ids
        job_id = next(iter(in_hand), None)
        return {"paused": is_paused, "phase": phase, "job_id": job_id, "job_ids": in_hand}
