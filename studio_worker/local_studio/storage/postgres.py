"""A studio's PostgreSQL database, which any number of studio processes share."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    OperationalError,
    TimeoutError,
)

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures import CannotStore, StorageAway, StorageFull
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.gate import Gate
from studio_worker.local_studio.storage.locks import Lock, take
from studio_worker.local_studio.storage.migrating import migrate
from studio_worker.local_studio.storage.postgres_trouble import (
    DISK_FULL,
    READ_ONLY,
    require_unicode,
    unusable,
)

_CONNECTIONS = 8
"""Of one studio process: most steps take a millisecond, and a server has a hundred by default."""

_WAIT_S = 10
"""For one of them."""

_OPTIONS = {
    "application_name": "studio-worker",
    "client_encoding": "utf8",
    "connect_timeout": 3,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 5_000,
    "options": "-c lock_timeout=5s",
}
"""A server that vanished without a word is noticed within seconds, and so is a row that another process holds
and does not let go of: sessions wait for it on the event loop (libpq's parameters).
"""


class PostgresDatabase(Database):
    """One PostgreSQL database. Connections that broke are made again by themselves.

    Args:
        address: ``postgresql://USER:PASSWORD@HOST:PORT/NAME``; what it leaves out libpq takes from its
            environment (``PGPASSFILE``, ``PGSSLMODE``).
        on_change: called after every committed write.

    Raises:
        ConfigError: it cannot be used, a later version of this program has been here, or its driver is not
            installed. The password is not in it.
        StateUnavailable: it does not answer, or takes nothing now.
    """

    is_shared = True

    def __init__(self, address: str, on_change: Callable[[], None]) -> None:
        self.url = url_of(address)
        engine = _engine(self.url)
        name = f"{self.url.host or self.url.query.get('host', 'localhost')}/{self.url.database or ''}"
        try:
            with _at_the_start(name):
                with engine.begin() as connection:
                    require_unicode(connection, name)
                    connection.exec_driver_sql("SET LOCAL lock_timeout = 0")  # another may have much to do
                    take(connection, Lock.MIGRATION)
                    migrate(connection, name)
                # Each by itself: no way to the server and back for its beginning and its end.
                single = engine.execution_options(isolation_level="AUTOCOMMIT")
                super().__init__(engine, on_change, _translated, single)
        except BaseException:
            engine.dispose()
            raise


@contextmanager
def _at_the_start(name: str) -> Iterator[None]:
    try:
        yield
    except CannotStore as error:  # of the first step, told as below
        raise unusable(error.__cause__ or error, name) from None
    except (DBAPIError, TimeoutError) as error:
        raise unusable(error, name) from None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise StorageAway("the database is too busy") from error
    except DBAPIError as error:
        code = getattr(error.orig, "sqlstate", None)
        if code == DISK_FULL:
            raise StorageFull(f"the database takes no more data ({error.orig})") from error
        if isinstance(error, OperationalError | InterfaceError) or code == READ_ONLY:
            raise StorageAway(f"the database does not answer ({error.orig})") from error
        raise


def url_of(address: str) -> URL:
    """What an operator wrote, for the driver. Raises ConfigError where it is no address of PostgreSQL."""
    try:
        url = make_url(address.replace("postgres://", "postgresql://", 1))
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        url = URL.create("")
    if url.drivername != "postgresql":
        raise ConfigError(
            "is no address of a database",
            cure="write postgresql://USER@HOST/NAME",
            key="--database",
        )
    return url.set(drivername="postgresql+psycopg")


def options_of(url: URL) -> dict[str, object]:
    """How a connection is made and watched over, where the address does not say so itself."""
    return {name: value for name, value in _OPTIONS.items() if name not in url.query}


def _engine(url: URL) -> Engine:
    try:
        engine = create_engine(
            url,
            connect_args=options_of(url),
            pool_size=_CONNECTIONS,
            max_overflow=0,
            pool_timeout=_WAIT_S,
            hide_parameters=True,  # of errors in the log: there are prompts among them
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "PostgreSQL's driver is not installed",
            cure="install the package studio-worker-farm, or studio-worker[farm] with pip",
            key="--database",
        ) from error
    event.listen(engine, "checkout", _look)
    Gate(engine)
    return engine


def _look(connection: Any, _record: object, _fairy: object) -> None:
    """Whether the server has gone since: what comes unasked is its farewell. To ask, as SQLAlchemy would, is
    one more way there and back for each step.
    """
    unasked = select.poll()
    if not connection.closed:
        unasked.register(connection, select.POLLIN)
    if connection.closed or unasked.poll(0):
        raise DisconnectionError("the server has gone")
