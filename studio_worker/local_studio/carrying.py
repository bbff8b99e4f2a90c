"""A studio of one SQLite file carried to another database, and its pictures to another place, just as it is.

The source is only read: its file is copied first, and an older one is brought up to date in the copy. The
target must be empty. Pictures go first, under new keys; then all rows go in one transaction, so that whoever
is killed on the way leaves an empty target and, at most, pictures without a row.
"""

from __future__ import annotations

import fcntl
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO
from urllib.parse import quote

from sqlalchemy import Connection, Table, delete, func, insert, select

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures import CannotStore, Folder, PictureGone, Pictures
from studio_worker.local_studio.places import DATABASE_NAME, PICTURES_FOLDER, Places, open_places, owner_of
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.locks import be_patient
from studio_worker.local_studio.storage.migrating import require_own_form
from studio_worker.local_studio.storage.sqlite import SqliteFile, lock_of
from studio_worker.local_studio.storage.tables import METADATA, files, meta, results

_ROWS = 500
"""At a time in memory."""
_TOLD_EVERY = 100
_OF_NOW = ("processes",)
"""Tables about studio processes; none is at work while a studio is carried. Who had a job goes on with it."""

Tell = Callable[[str], None]


def carry_studio(folder: Path, places: Places, tell: Tell) -> None:
    """Carry the studio of a data folder to ``places``, which must be empty; ``tell`` hears how far it is.

    Raises:
        ConfigError: there is no studio, it is at work, or the new places cannot be used.
        CannotStore: they take no more.
    """
    pictures = Folder(folder / PICTURES_FOLDER)
    store = places.open_pictures()
    if isinstance(store, Folder) and store.path.resolve() == pictures.path.resolve():
        raise ConfigError(
            "is the folder of the studio that is carried",
            cure="choose another folder: the old one stays as it is",
            key="--pictures",
            source=str(store.path),
        )
    with standing_still(folder / DATABASE_NAME) as copy:
        database, _ = open_places(replace(places, pictures=store), lambda: None)
        with closing(database):
            carry(copy, pictures, database, store, tell)


@contextmanager
def standing_still(file: Path) -> Iterator[Path]:
    """A copy of a studio's file in a temporary folder; no studio opens the file meanwhile.

    Raises:
        ConfigError: there is none, a studio is at work there, or there is no room for the copy.
    """
    with ExitStack() as stack:
        stack.enter_context(_held(file))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="studio-carry-")))
        copy = folder / file.name
        try:
            with closing(_opened(file)) as source:
                source.execute("VACUUM INTO ?", (str(copy),))
        except sqlite3.Error as error:
            raise ConfigError(
                f"cannot be copied to {folder} ({error})",
                cure="make room there, or name another folder in TMPDIR",
                source=str(file),
            ) from error
        yield copy


def carry(copy: Path, pictures: Folder, target: Database, store: Pictures, tell: Tell) -> None:
    """All rows and pictures of a studio into an empty one.

    Args:
        copy: of its file, by :func:`standing_still`.
        pictures: where those lie that are no part of an older file.
        target: empty; open.
        store: where its pictures go.
        tell: how far it is, a line each.

    Raises:
        ConfigError: the target is not empty, or one of them is a later version's.
        CannotStore: it takes no more.
    """
    taken_out = Folder(copy.parent / PICTURES_FOLDER)
    source = SqliteFile(copy, lambda: None, taken_out)
    with closing(source), source.reading() as reading:
        require_own_form(reading, "--from")
        with target.reading() as connection:
            require_own_form(connection, "--database")
            _require_empty(connection)
        owner = owner_of(source.salt)
        if not store.check(owner):
            store.claim(owner, None, is_first=True)
        moved: dict[str, str] = {}
        try:
            _carry_pictures(reading, (taken_out, pictures), store, moved, tell)
            with target.writing() as writing:
                be_patient(writing)
                _require_empty(writing)
                _carry_rows(reading, writing, moved, tell)
        except BaseException:
            for key in moved.values():
                with suppress(CannotStore):
                    store.delete(key)
            raise


def _carry_pictures(
    reading: Connection, sources: Sequence[Folder], store: Pictures, moved: dict[str, str], tell: Tell
) -> None:
    keys = [key for table in (results, files) for key in reading.execute(select(table.c.key)).scalars()]
    gone = 0
    for number, key in enumerate(keys, start=1):
        try:
            content = _open(key, sources)
        except PictureGone:
            gone += 1
        else:
            with content:
                name, _, ext = key.rpartition(".")
                moved[key] = store.put(content, name.rpartition("-")[0], ext).key
        if number % _TOLD_EVERY == 0 or number == len(keys):
            tell(f"pictures: {number} of {len(keys)}")
    if gone:
        tell(f"pictures: {gone} were not there any more")


def _open(key: str, sources: Sequence[Folder]) -> IO[bytes]:
    for source in sources[:-1]:
        with suppress(PictureGone):
            return source.open(key).content
    return sources[-1].open(key).content


def _carry_rows(reading: Connection, writing: Connection, moved: dict[str, str], tell: Tell) -> None:
    writing.execute(delete(meta))  # its own salt; workers' tokens are good with the old one only
    for table in _tables():
        count = 0
        for part in reading.execute(select(table)).mappings().partitions(_ROWS):
            rows = [dict(row) for row in part]
            if table in (results, files):
                rows = [row | {"key": moved.get(row["key"], row["key"])} for row in rows]
            writing.execute(insert(table), rows)
            count += len(rows)
            tell(f"{table.name}: {count}")
        if count:
            _count_on(writing, table)


def _count_on(writing: Connection, table: Table) -> None:
    """The next row's number is one that no row has; SQLite sees to that by itself."""
    column = table.autoincrement_column
    if column is not None and writing.dialect.name == "postgresql":
        sequence = func.pg_get_serial_sequence(table.name, column.name)
        writing.execute(select(func.setval(sequence, func.max(column))))


def _require_empty(connection: Connection) -> None:
    for table in METADATA.sorted_tables:
        if table is not meta and connection.execute(select(table).limit(1)).first() is not None:
            raise ConfigError(
                f"the database there is not empty: it has {table.name}",
                cure="name a new one; where a studio was only started, drop the database and make it anew",
                key="--database",
            )


def _tables() -> list[Table]:
    return [table for table in METADATA.sorted_tables if table.name not in _OF_NOW]


def _opened(file: Path) -> sqlite3.Connection:
    # Without a log beside it nothing is written by anybody: SQLite need not make one to read.
    is_whole = not file.with_name(f"{file.name}-wal").exists()
    mode = "immutable=1" if is_whole else "mode=ro"
    return sqlite3.connect(f"file:{quote(str(file))}?{mode}", uri=True)


@contextmanager
def _held(file: Path) -> Iterator[None]:
    try:
        with file.open("rb"):
            pass
        lock = lock_of(file)
        held = (lock if lock.exists() else file).open("rb")
    except OSError as error:
        raise ConfigError(
            f"holds no studio that can be read ({error.strerror})",
            cure="name the folder that its --data named",
            key="--from",
            source=str(file.parent),
        ) from error
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                "a studio is at work there", cure="stop it first", key="--from", source=str(file.parent)
            ) from error
        yield
