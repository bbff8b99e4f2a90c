"""Where one studio keeps what must outlive it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, select, union_all

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures import Folder, Pictures
from studio_worker.local_studio.storage.database import Database, insert_new
from studio_worker.local_studio.storage.locks import be_patient
from studio_worker.local_studio.storage.postgres import PostgresDatabase
from studio_worker.local_studio.storage.sqlite import SqliteFile
from studio_worker.local_studio.storage.tables import files, meta, results

DATABASE_NAME = "studio.sqlite3"
"""In the data folder."""

PICTURES_FOLDER = "pictures"
"""Beside a SQLite file."""

OWNER = "pictures"
"""The row of ``meta`` that has the mark of the database's pictures, once they have it."""

_DERIVED = "marked"
"""What stands there in databases of before: the mark is made of the salt."""


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
            return Folder(self.database.parent / PICTURES_FOLDER, is_beside=True)
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


def claim_pictures(database: Database, pictures: Pictures) -> None:
    """Have the pictures marked as this database's, once for all its processes. Raises ConfigError."""
    with database.reading() as connection:
        owner = owner_in(connection, database.salt)
    is_own = pictures.check(owner)  # by itself: a storage may take its time
    with database.writing() as connection:
        be_patient(connection)
        # Of two processes that start at once the second waits here, and finds the mark of the first.
        is_first = insert_new(connection, meta, {"key": OWNER, "value": owner})
        if not is_own:
            pictures.claim(owner, newest_key(connection), is_first=is_first)


def owner_in(connection: Connection, salt: str) -> str:
    """What a database marks its pictures with, whether it has done so yet or not."""
    said = connection.execute(select(meta.c.value).where(meta.c.key == OWNER)).scalar()
    return owner_of(salt) if said in (None, _DERIVED) else str(said)


def owner_of(salt: str) -> str:
    """Names a database to whatever keeps its pictures, and tells nothing else of it."""
    return hashlib.sha256(f"pictures of {salt}".encode()).hexdigest()


def newest_key(connection: Connection) -> str | None:
    """Of the pictures that a database names."""
    keys = union_all(*(select(table.c.key, table.c.created_at) for table in (results, files))).subquery()
    newest = select(keys.c.key).order_by(keys.c.created_at.desc()).limit(1)
    return connection.execute(newest).scalar()
