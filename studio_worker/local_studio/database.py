"""The one SQLite file: connection and transactions. What the tables mean is known by their owners.

One connection serves all threads behind one lock; write-ahead logging keeps readers of the file (a backup,
``sqlite3``) out of the way. Whoever writes gets :attr:`Database.on_change` called after the commit, outside
the lock, so that listeners may read at once.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures import Pictures, StorageFull
from studio_worker.local_studio.schema import STEPS

Row = sqlite3.Row

_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
"""What a full, read-only or failing disk is called; the low byte of SQLite's result code."""


class Database:
    """One open SQLite file, held by one studio at a time.

    Args:
        path: the file; its folder is made (0700) where it is missing. Readable by the owner only, because
            it holds prompts.
        on_change: called after every committed write.
        pictures: where the bytes lie that an older file holds itself.

    Raises:
        ConfigError: the folder cannot be written, the file is no database of this program, or another
            local studio has it open.
    """

    def __init__(self, path: Path, on_change: Callable[[], None], pictures: Pictures) -> None:
        self.path = path
        self.on_change = on_change
        self._lock = threading.RLock()
        self.last_opened_at = _changed_at(_lock_of(path))
        """When a studio opened it before this one; infinitely late where none did."""
        self._held = _hold(path)
        try:
            pictures.clear_unfinished()
            self._connection = _open(path, pictures)
        except sqlite3.Error as error:
            self._held.close()
            raise ConfigError(
                f"cannot be opened as a database ({error})",
                cure="move the file away, or choose another data folder",
                source=str(path),
            ) from error
        except (ConfigError, StorageFull) as error:
            self._held.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"cannot be brought up to date ({error})",
                cure="make room on its disk; it is as it was",
                source=str(path),
            ) from error
        self.is_new = self.row("SELECT 1 FROM meta WHERE key = 'salt'") is None
        self.salt = self._salt()

    def close(self) -> None:
        """Close the file; other studios may open it then."""
        with self._lock:
            self._connection.close()
            self._held.close()

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a query."""
        with self._lock:
            return self._connection.execute(sql, parameters).fetchall()

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Row | None:
        """The first row of a query."""
        with self._lock:
            row: Row | None = self._connection.execute(sql, parameters).fetchone()
            return row

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        """A change that is part of the transaction under way: only within :meth:`writing`."""
        with self._lock:
            self._connection.execute(sql, parameters)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, all or nothing; listeners hear of it after the commit. Raises StorageFull."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:  # SQLite itself has ended it where the disk is full
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _NO_ROOM:
                    raise StorageFull(f"the studio's disk takes no more data ({error})") from error
                raise
        self.on_change()

    def _salt(self) -> str:
        row = self.row("SELECT value FROM meta WHERE key = 'salt'")
        if row is None:
            with self.writing() as connection:
                connection.execute("INSERT INTO meta VALUES ('salt', ?)", (secrets.token_hex(32),))
            return self._salt()
        return str(row["value"])


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return float("inf")


def _hold(path: Path) -> IO[bytes]:
    # A lock file of its own: SQLite's locks are per transaction, and two studios that release each
    # other's claims at start would do so quietly.
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made here, with its mode: SQLite gives the same mode to the -wal and -shm files beside it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        held = _lock_of(path).open("wb")
        os.utime(_lock_of(path))
    except OSError as error:
        raise ConfigError(
            f"the data folder cannot be written ({error.strerror})",
            cure="make it writable for this user, or choose another one",
            source=str(path.parent),
        ) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        raise ConfigError(
            "another local studio uses this database",
            cure="stop it first, or choose another data folder",
            source=str(path),
        ) from error
    return held


def _open(path: Path, pictures: Pictures) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(STEPS):
            raise ConfigError(
                f"was written by a later version of this program (schema {version})",
                cure="use that version, or choose another data folder",
                source=str(path),
            )
        for number, step in enumerate(STEPS[version:], start=version + 1):
            connection.execute("BEGIN IMMEDIATE")
            step(connection, pictures)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        if 0 < version < len(STEPS):
            with suppress(sqlite3.OperationalError):  # what an older file held itself made it large
                connection.execute("VACUUM")
    except BaseException:
        connection.close()
        raise
    return connection
