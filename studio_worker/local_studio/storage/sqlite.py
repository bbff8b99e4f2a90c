"""A studio's SQLite file: held by one studio at a time, one connection for all threads.

Write-ahead logging keeps readers of the file (a backup, ``sqlite3``) out of the way.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.files import DISK_TROUBLES
from studio_worker.local_studio.pictures import Pictures, StorageFull
from studio_worker.local_studio.storage.database import WRITES, Database
from studio_worker.local_studio.storage.migrating import migrate
from studio_worker.local_studio.storage.older_files import STEPS

_WITH_REVISIONS = max(STEPS) + 1
"""The ``user_version`` of files whose steps Alembic counts: a program from before refuses them as later."""

_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
"""What a full, read-only or failing disk is called; the low byte of SQLite's result code."""

_HELD = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
"""What it is called that another program reads or writes the file for so long."""

_WAIT_S = 300
"""For the one connection. Only a fault in here could hold it for so long."""


class SqliteFile(Database):
    """One open SQLite file.

    Args:
        path: the file; its folder is made (0700) where it is missing. Readable by the owner only, because
            it holds prompts.
        on_change: called after every committed write.
        pictures: where the bytes lie that an older file holds itself.

    Raises:
        ConfigError: the folder cannot be written, the file is no database of this program, or another
            local studio has it open.
        StateUnavailable: its disk is full, read-only or failing, or another program holds it.
    """

    def __init__(self, path: Path, on_change: Callable[[], None], pictures: Pictures) -> None:
        self.last_opened_at = _changed_at(lock_of(path))
        self._held = _hold(path)
        engine = _engine(path)
        try:
            with _telling_of(path):
                _bring_up_to_date(engine, path, pictures)
                super().__init__(engine, on_change, _translated)
        except BaseException:
            engine.dispose()
            self._held.close()
            raise

    def close(self) -> None:
        """Close the file; other studios may open it then. Closed before, it stays so."""
        if self._is_closed:
            return
        with self.reading() as connection:  # whoever has it finishes first
            self._is_closed = True
            connection.detach()
        super().close()
        self._held.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if _code_of(error) in _NO_ROOM:
            raise StorageFull(f"the studio's disk takes no more data ({error.orig})") from error
        raise


def _engine(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"isolation_level": None, "check_same_thread": False, "timeout": 10},
        pool_size=1,
        max_overflow=0,
        pool_timeout=_WAIT_S,
        hide_parameters=True,  # of errors in the log: there are prompts among them
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # The driver itself would begin none before a SELECT, and one that fails at its first write.
        if connection.get_execution_options().get(WRITES):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _bring_up_to_date(engine: Engine, path: Path, pictures: Pictures) -> None:
    with engine.connect() as connection:
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > _WITH_REVISIONS:
            raise ConfigError(
                f"was written by a later version of this program (schema {version})",
                cure="use that version, or choose another data folder",
                source=str(path),
            )
        if version:
            _take_older_steps(connection, version, pictures)
    is_older = 0 < version < _WITH_REVISIONS
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        migrate(connection, str(path), is_older=is_older)
        connection.exec_driver_sql(f"PRAGMA user_version = {_WITH_REVISIONS}")
    if is_older:
        with engine.connect() as connection, suppress(DBAPIError):
            connection.exec_driver_sql("VACUUM")  # what an older file held itself made it large


def _take_older_steps(connection: Connection, version: int, pictures: Pictures) -> None:
    raw = connection.connection.driver_connection
    assert isinstance(raw, sqlite3.Connection)
    for number, step in STEPS.items():
        if version < number:
            raw.execute("BEGIN IMMEDIATE")
            step(raw, pictures)
            raw.execute(f"PRAGMA user_version = {number}")
            raw.execute("COMMIT")


@contextmanager
def _telling_of(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageFull as error:
        raise _no_room(path, error) from error
    except (DBAPIError, sqlite3.Error) as error:
        reason = error.orig if isinstance(error, DBAPIError) else error
        code = _code_of(error)
        if code in _NO_ROOM:
            raise _no_room(path, reason) from error
        if code in _HELD:
            raise StateUnavailable(
                f"another program holds it ({reason})", cure="end that program, or wait", source=str(path)
            ) from error
        raise ConfigError(
            f"cannot be opened as a database ({reason})",
            cure="move the file away, or choose another data folder",
            source=str(path),
        ) from error


def _code_of(error: DBAPIError | sqlite3.Error) -> int:
    """SQLite's own, without what it adds; -1 where the error is not SQLite's."""
    reason = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(reason, "sqlite_errorcode", None)
    return -1 if code is None else int(code) & 0xFF


def _no_room(path: Path, reason: object) -> StateUnavailable:
    return StateUnavailable(
        f"its disk takes no more data, or fails ({reason})",
        cure="make room on its disk, or see to it; the studio is as it was",
        source=str(path),
    )


def lock_of(path: Path) -> Path:
    """What a studio holds while it has the file open."""
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
        held = lock_of(path).open("wb")
        os.utime(lock_of(path))
    except IsADirectoryError as error:
        raise ConfigError(
            "is a folder",
            cure="name a file in it, or name it with --data",
            source=str(path),
            key="--database",
        ) from error
    except OSError as error:
        if error.errno in DISK_TROUBLES:
            raise _no_room(path, error.strerror) from error
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
