"""Studios on PostgreSQL where a test names a SQLite file: the same file is the same database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from sqlalchemy import NullPool, create_engine, make_url

from studio_worker.local_studio.pictures import Pictures
from studio_worker.local_studio.places import Places, open_places
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.migrating import migrate
from tests.farm.postgres import Cluster


class OnPostgres(ExitStack):
    """One server, and a database for each file. Tables are made once, and copied."""

    def __enter__(self) -> Self:
        super().__enter__()
        self.cluster = self.enter_context(Cluster())
        self._template = self.cluster.create()
        url = make_url(self.cluster.url(self._template)).set(drivername="postgresql+psycopg")
        engine = create_engine(url, poolclass=NullPool)
        with engine.begin() as connection:
            migrate(connection, "template")
        self._names: dict[Path, str] = {}
        return self

    def open(self, places: Places, on_change: Callable[[], None]) -> tuple[Database, Pictures]:
        """What ``open_places`` does."""
        if isinstance(places.database, Path):
            pictures = places.open_pictures()
            places = Places(self.url(places.database), pictures)
        return open_places(places, on_change)

    def url(self, path: Path) -> str:
        """The database that stands for this file."""
        if path not in self._names:
            self._names[path] = self.cluster.create(self._template)
        return self.cluster.url(self._names[path])

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Databases that come into being within do not outlive it."""
        before = set(self._names)
        yield
        for path in self._names.keys() - before:
            self.cluster.drop(self._names.pop(path))
