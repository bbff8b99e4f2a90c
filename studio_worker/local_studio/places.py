"""Where one studio keeps what must outlive it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from studio_worker.local_studio.pictures import Folder, Pictures

PICTURES_FOLDER = "pictures"
"""Beside the database."""


@dataclass(frozen=True)
class Places:
    """The SQLite file, and what keeps the pictures; without one they lie in a folder beside the file."""

    database: Path
    pictures: Pictures | None = None

    def open_pictures(self) -> Pictures:
        """What keeps the pictures."""
        return self.pictures or Folder(self.database.parent / PICTURES_FOLDER)
