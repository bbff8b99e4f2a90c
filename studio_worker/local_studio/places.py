"""Where one studio keeps what must outlive it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures import Folder, Pictures
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.postgres import PostgresDatabase
from studio_worker.local_studio.storage.sqlite import SqliteFile

DATABASE_NAME = "studio.sqlite3"
"""In the data folder."""

PICTURES_FOLDER = "pictures"
"""Beside a SQLite file."""


@dataclass(frozen=True)
class Places:
    """The database, a SQLite file or an address that begins with ``postgresql://``; and what keeps the
    pictures, which without one lie in a folder beside the file.
    """

    database: Path | str
    pictures: Pictures | None = None

    def open_pictures(self) -> Pictures:
        """What keeps the pictures. Raises ConfigError."""
        if self.pictures is not None:
            return self.pictures
        if isinstance(self.database, Path):
            return Folder(self.database.parent / PICTURES_FOLDER)
        raise ConfigError(
            "a studio on PostgreSQL has no folder of its own for pictures",
            cure="say where they go: S3 storage, or a folder that all its processes have",
            key="--pictures",
        )


def open_places(places: Places, on_change: Callable[[], None]) -> tuple[Database, Pictures]:
    """The database in its present form, and what keeps the pictures. Raises ConfigError."""
    pictures = places.open_pictures()
    if isinstance(places.database, Path):
        return SqliteFile(places.database, on_change, pictures), pictures
    return PostgresDatabase(places.database, on_change), pictures


def owner_of(salt: str) -> str:
    """Names the database to whatever keeps its pictures, and tells nothing else of it."""
    return hashlib.sha256(f"pictures of {salt}".encode()).hexdigest()
