"""A studio of one SQLite file while nobody works in it: held, copied, and read from the copy.

Nothing of it is written. An older file is brought up to date in the copy, which has its prompts and so lies
where this user alone can read; one that a crash has left there goes before the next is made.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from sqlalchemy import Connection

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.local_studio.pictures import Folder, StorageAway
from studio_worker.local_studio.places import DATABASE_NAME, PICTURES_FOLDER, owner_in
from studio_worker.local_studio.storage.migrating import require_own_form
from studio_worker.local_studio.storage.sqlite import SqliteFile, lock_of

_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


@dataclass(frozen=True)
class StoppedStudio:
    """What is read of it.

    Args:
        rows: a connection to the copy.
        owner: what its pictures are marked with.
        folders: where they may lie: those that were part of an older file, and the folder beside it.
    """

    rows: Connection
    owner: str
    folders: Sequence[Folder]

    def has(self, key: str) -> bool:
        """Whether a picture lies in one of the folders."""
        return any(folder.file(key).exists() for folder in self.folders)

    def open(self, key: str) -> IO[bytes]:
        """A picture.

        Raises:
            PictureGone: it is not there.
            StateUnavailable: it cannot be read.
        """
        folder = next((folder for folder in self.folders if folder.has(key)), self.folders[-1])
        try:
            return folder.open(key).content
        except StorageAway as error:
            raise StateUnavailable(
                str(error),
                cure="see to its disk, and to whose its files are, and begin again: nothing was carried",
                key="--from",
                source=str(folder.file(key)),
            ) from error


@contextmanager
def stopped_studio(folder: Path) -> Iterator[StoppedStudio]:
    """The studio of a data folder; no other opens it meanwhile.

    Raises:
        ConfigError: there is none, a studio is at work there, or there is no room for the copy.
    """
    file = folder / DATABASE_NAME
    with ExitStack() as stack:
        stack.enter_context(_held(file))
        prefix = f"studio-carry-{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:12]}-"
        _remove_left(prefix)  # whoever is at work has the file in hand
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
        taken_out = Folder(scratch / PICTURES_FOLDER)
        with _telling_of(folder, scratch):
            _copy(file, scratch / file.name)
            source = SqliteFile(scratch / file.name, lambda: None, taken_out)
        stack.enter_context(closing(source))
        rows = stack.enter_context(source.reading())
        with _telling_of(folder, scratch):
            require_own_form(rows, str(file))
        folders = (taken_out, Folder(folder / PICTURES_FOLDER))
        yield StoppedStudio(rows, owner_in(rows, source.salt), folders)


def _copy(file: Path, copy: Path) -> None:
    # Without a log beside it nothing is written by anybody: SQLite need not make one to read.
    is_whole = not file.with_name(f"{file.name}-wal").exists()
    mode = "immutable=1" if is_whole else "mode=ro"
    with closing(sqlite3.connect(f"file:{quote(str(file))}?{mode}", uri=True)) as source:
        (version,) = source.execute("PRAGMA user_version").fetchone()
        if version == 0:  # which any other program's file has
            raise _no_studio("its tables are another program's, or none", file.parent)
        source.execute("VACUUM INTO ?", (str(copy),))


@contextmanager
def _telling_of(folder: Path, scratch: Path) -> Iterator[None]:
    """What goes wrong with the copy, by the name of what is copied."""
    try:
        yield
    except StateUnavailable as error:
        raise _no_room(folder, scratch, error.problem) from error
    except ConfigError as error:
        raise ConfigError(error.problem, cure=error.cure, key="--from", source=str(folder)) from error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise _no_studio(str(error), folder) from error
        raise _no_room(folder, scratch, str(error)) from error


def _no_studio(reason: str, folder: Path) -> ConfigError:
    return ConfigError(
        f"holds no studio that can be read ({reason})",
        cure="name the folder that its --data named",
        key="--from",
        source=str(folder),
    )


def _no_room(folder: Path, scratch: Path, reason: str) -> StateUnavailable:
    return StateUnavailable(
        f"its file cannot be copied to {scratch.parent} ({reason})",
        cure="make room there, or name another folder in TMPDIR",
        key="--from",
        source=str(folder),
    )


def _remove_left(prefix: str) -> None:
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            if left.lstat().st_uid == os.geteuid():  # one of another user's is not ours to judge
                shutil.rmtree(left)


@contextmanager
def _held(file: Path) -> Iterator[None]:
    try:
        with file.open("rb"):
            pass
        lock = lock_of(file)
        held = (lock if lock.exists() else file).open("rb")
    except OSError as error:
        raise _no_studio(str(error.strerror), file.parent) from error
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                "a studio is at work there", cure="stop it first", key="--from", source=str(file.parent)
            ) from error
        yield
