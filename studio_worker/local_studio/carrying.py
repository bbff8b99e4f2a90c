"""A studio of one SQLite file carried to another database, and its pictures to another place, just as it is.

The old studio is only read. The target must be empty, or have nothing but what a first start makes. Pictures
go first, under new keys; then all rows go in one transaction, so that whoever is killed on the way leaves an
empty target and, at most, pictures without a row, which the next attempt removes.

The new database has a mark of its own for its pictures: both studios may be started, each with its own. Where
the place that is named has the old one's mark its pictures stay there, and are the new one's from then on.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from sqlalchemy import select

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.local_studio.carried_rows import (
    Tell,
    begin_attempt,
    copy_rows,
    require_alone,
    require_empty,
)
from studio_worker.local_studio.pictures import (
    CannotStore,
    Folder,
    PictureGone,
    StorageAway,
    StorageFull,
)
from studio_worker.local_studio.pictures.marks import Standing, standing
from studio_worker.local_studio.places import (
    DATABASE_NAME,
    OWNER,
    PICTURES_FOLDER,
    Places,
    open_places,
    owner_of,
)
from studio_worker.local_studio.stopped import StoppedStudio, stopped_studio
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.locks import be_patient
from studio_worker.local_studio.storage.migrating import require_own_form
from studio_worker.local_studio.storage.tables import files, meta, results

_TOLD_EVERY = 100


def carry_studio(folder: Path, places: Places, tell: Tell) -> None:
    """Carry the studio of a data folder to ``places``, which must be empty; ``tell`` hears how far it is.

    Raises:
        ConfigError: there is no studio, it is at work, or the new places cannot be used; StateUnavailable
            where they take nothing now.
    """
    store = places.open_pictures()
    if places.pictures is None and isinstance(store, Folder):
        store = Folder(store.path)  # beside the new file may lie pictures of an old one
    if isinstance(store, Folder) and store.path.resolve() == (folder / PICTURES_FOLDER).resolve():
        raise ConfigError(
            "is the folder of the studio that is carried",
            cure="choose another folder, or move this one there: what is in the data folder stays as it is",
            key="--pictures",
            source=str(store.path),
        )
    if isinstance(places.database, Path) and places.database.resolve() == (folder / DATABASE_NAME).resolve():
        raise ConfigError(
            "is the file of the studio that is carried",
            cure="name a new one",
            key="--database",
            source=str(places.database),
        )
    with stopped_studio(folder) as source:
        places = replace(places, pictures=store)
        database, _ = open_places(places, lambda: None)
        with closing(database):
            Carrier(source, database, places, tell).carry()


class Carrier:
    """One attempt.

    Args:
        target: the database of ``places``, open.
        tell: how far it is, a line each.
    """

    def __init__(self, source: StoppedStudio, target: Database, places: Places, tell: Tell) -> None:
        self._source = source
        self._target = target
        self._file = places.database if isinstance(places.database, Path) else None
        self._store = places.open_pictures()
        self._tell = tell
        self._attempt = ""
        self._since: float | None = None
        self._moved: dict[str, str] = {}
        self._is_sent = False
        self._is_away = False

    def carry(self) -> None:
        """All rows and pictures. Raises ConfigError."""
        with self._telling("--database"), self._target.writing() as writing:
            self._attempt, self._since = begin_attempt(writing)
            require_own_form(writing, "--database")
            require_empty(writing, is_shared=self._target.is_shared)
            is_first = writing.execute(select(meta).where(meta.c.key == OWNER)).first() is None
        stay = standing(self._store.mark(), self._source.owner) in (Standing.OWN, Standing.CARRIED)
        owner = self._owner_where_they_stay() if stay else self._owner_of_a_new_place(is_first)
        try:
            with self._telling("--pictures"):
                self._carry_pictures(self._missing_there() if stay else self._all_from_here())
            self._carry_rows(owner)
        except BaseException:
            if not (self._is_sent or self._is_away):
                self._take_back()
            raise
        if stay:
            self._take_over(owner)

    def _owner_of_a_new_place(self, is_first: bool) -> str:
        # Of its own salt, and not of the one that comes with the rows; the same with each attempt, so that a
        # place which one has marked is this database's all the same.
        owner = owner_of(self._target.salt)
        if not self._store.check(owner):
            self._store.claim(owner, None, is_first=is_first)
        with self._telling("--pictures"):
            if self._since is not None:  # no row names what attempts of before left
                self._store.remove_unnamed((), self._since)
        return owner

    def _owner_where_they_stay(self) -> str:
        self._store.check(self._source.owner)  # one that was carried with them before is told so
        return f"{secrets.token_hex(32)} {self._source.owner}"

    def _take_over(self, owner: str) -> None:
        """The place becomes the new studio's after its rows are there: if not here, then with that one's
        start.
        """
        self._tell("pictures: they stay where they are, and the old studio is not started with them any more")
        try:
            self._store.claim(owner, None, is_first=False)
        except ConfigError as error:
            self._tell(f"pictures: not marked yet ({error}); start the new studio before the old one")

    def _all_from_here(self) -> list[str]:
        keys = self._keys()
        if keys and not any(map(self._source.has, keys)):
            raise ConfigError(
                "holds none of the studio's pictures",
                cure="with --pictures name the place where they are, and they stay there; or copy them here",
                key="--from",
                source=str(self._source.folders[-1].path),
            )
        return keys

    def _missing_there(self) -> list[str]:
        """Of those that lie in the data folder: the other place may be an older copy of it."""
        return [key for key in self._keys() if self._source.has(key) and not self._store.has(key)]

    def _carry_pictures(self, keys: Sequence[str]) -> None:
        gone = 0
        for number, key in enumerate(keys, start=1):
            try:
                content = self._source.open(key)
            except PictureGone:
                gone += 1
            else:
                with content:
                    name, _, ext = key.rpartition(".")
                    self._moved[key] = self._store.put(content, name.rpartition("-")[0], ext).key
            if number % _TOLD_EVERY == 0 or number == len(keys):
                self._tell(f"pictures: {number} of {len(keys)}")
        if gone:
            self._tell(f"pictures: {gone} were not there any more")

    def _keys(self) -> list[str]:
        return [
            key
            for table in (results, files)
            for key in self._source.rows.execute(select(table.c.key)).scalars()
        ]

    def _carry_rows(self, owner: str) -> None:
        with self._telling("--database"), self._target.writing() as writing:
            be_patient(writing)
            require_alone(writing, self._attempt)
            require_empty(writing, is_shared=self._target.is_shared)
            copy_rows(self._source.rows, writing, owner, self._moved, self._tell)
            self._is_sent = True  # a server that is away now may have heard it or not

    def _take_back(self) -> None:
        with suppress(CannotStore):
            for key in self._moved.values():
                self._store.delete(key)

    @contextmanager
    def _telling(self, option: str) -> Iterator[None]:
        try:
            yield
        except CannotStore as error:
            cure = "make room there" if isinstance(error, StorageFull) else "see to it"
            place = self._file
            if option == "--pictures":
                place = self._store.path if isinstance(self._store, Folder) else None
                self._is_away = isinstance(error, StorageAway)
            outcome = (
                "where it is not empty then it has everything" if self._is_sent else "nothing was carried"
            )
            raise StateUnavailable(
                str(error),
                cure=f"{cure}, and begin again: {outcome}",
                key=option,
                source="" if place is None else str(place),
            ) from error
