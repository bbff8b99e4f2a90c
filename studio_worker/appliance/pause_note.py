"""The operator's wish that a pause outlasts restarts: an empty file in the state folder, there or not."""

from __future__ import annotations

import logging
from pathlib import Path

from studio_worker.files import fsync_directory, write_atomic

log = logging.getLogger(__name__)


class PauseNote:
    """Whether the service begins paused. Only the service writes here.

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
