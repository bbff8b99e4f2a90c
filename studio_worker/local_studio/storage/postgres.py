"""A studio's PostgreSQL database, which any number of studio processes share."""

from __future__ import annotations

import importlib
import logging
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, ExceptionContext, NullPool, create_engine, event, make_url
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, TimeoutError

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures import CannotStore, StorageAway
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.gate import Gate
from studio_worker.local_studio.storage.locks import Lock, be_patient, is_free, take
from studio_worker.local_studio.storage.migrating import migrate
from studio_worker.local_studio.storage.postgres_trouble import (
    is_everybodys,
    is_read_only,
    require_unicode,
    told,
    unusable,
)
from studio_worker.local_studio.storage.tables import METADATA

logger = logging.getLogger(__name__)

_CONNECTIONS = 8
"""Of one studio process: most steps take a millisecond, and a server has a hundred by default."""

_WAIT_S = 4
"""For one of them."""

_OPTIONS = {
    "application_name": "studio-worker",
    "client_encoding": "utf8",
    "connect_timeout": 3,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 5_000,
    "options": "-c lock_timeout=2s -c idle_in_transaction_session_timeout=10s",
}
"""A server that vanished without a word is noticed within seconds, and so is a row that another process holds
and does not let go of: sessions wait for it on the event loop. A process that stands still in the middle of a
step loses what it holds (libpq's parameters, and the server's).
"""

_SOON_S = 2.0
"""So quick must the server be again; a step asks more than that."""

_CHECKS = (
    "UPDATE meta SET value = value WHERE false",
    f"LOCK TABLE {', '.join(METADATA.tables)} IN ROW EXCLUSIVE MODE",
)
"""What every step that writes does by itself, in nobody's way: it fails where a table is locked or not there,
where the user may not change it, and where the whole database is read only.
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
        self._asking = engine_of(self.url)
        self._gate = Gate(self._ask)
        name = f"{self.url.host or self.url.query.get('host', 'localhost')}/{self.url.database or ''}"
        try:
            with _at_the_start(name):
                with engine.begin() as connection:
                    require_unicode(connection, name)
                    be_patient(connection)  # another may have much to do
                    if not is_free(connection, Lock.MIGRATION):
                        logger.warning("another process has the tables in hand; waiting for it")
                        take(connection, Lock.MIGRATION)
                    migrate(connection, name)
                # Each by itself: no way to the server and back for its beginning and its end.
                single = engine.execution_options(isolation_level="AUTOCOMMIT")
                super().__init__(engine, on_change, self._telling, single)
        except BaseException:
            self._gate.end()
            engine.dispose()
            raise

    def close(self) -> None:
        """Nothing may be asked afterwards."""
        self._gate.end()
        super().close()

    def check(self) -> None:
        """Whether it lets everybody do all they have to; raises what it raises."""
        with self._telling(), self._writer.begin() as connection:
            self._require_open()
            _try_out(connection)

    def _ask(self) -> None:
        with self._asking.connect() as connection:
            connection.connection.dbapi_connection.be_quick(_SOON_S)  # type: ignore[union-attr]
            with connection.begin():
                _try_out(connection)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        self._gate.require_open()
        try:
            yield
        except TimeoutError as error:
            raise StorageAway("the database is too busy") from error
        except DBAPIError as error:
            if is_everybodys(error):
                self._gate.shut(error.orig)
            if (trouble := told(error)) is None:
                raise
            raise trouble from error


@contextmanager
def _at_the_start(name: str) -> Iterator[None]:
    try:
        yield
    except CannotStore as error:  # of the first step, told as below
        raise unusable(error.__cause__ or error, name) from None
    except (DBAPIError, TimeoutError) as error:
        raise unusable(error, name) from None


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


def engine_of(url: URL, **pool: Any) -> Engine:
    """Connections that are watched over, unless the address says otherwise; without ``pool`` none is kept.

    Raises:
        ConfigError: the driver is not installed.
    """
    try:
        # Only here: the driver is an extra.
        bounded = importlib.import_module("studio_worker.local_studio.storage.bounded")
        limit_s = None if "connect_timeout" in url.query else bounded.LIMIT_S * _servers_in(url)
        engine = create_engine(
            url,
            connect_args={name: value for name, value in _OPTIONS.items() if name not in url.query},
            hide_parameters=True,  # of errors in the log: there are prompts among them
            **(pool or {"poolclass": NullPool}),
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "PostgreSQL's driver is not installed",
            cure="install the package studio-worker-farm, or studio-worker[farm] with pip",
            key="--database",
        ) from error

    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it would tell of what it ignores, besides

    @event.listens_for(engine, "do_connect")
    def dial(_dialect: Dialect, _record: object, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return bounded.dial(lambda: bounded.BoundedConnection.connect(*given, **named), limit_s)

    return engine


def _servers_in(url: URL) -> int:
    """How many are dialled, one after the other."""
    named = url.query.get("host") or url.host or ""
    return (named if isinstance(named, str) else ",".join(named)).count(",") + 1


def _engine(url: URL) -> Engine:
    engine = engine_of(url, pool_size=_CONNECTIONS, max_overflow=0, pool_timeout=_WAIT_S)
    event.listen(engine, "checkout", _look)
    event.listen(engine, "handle_error", _leave)
    return engine


def _try_out(connection: Connection) -> None:
    for statement in _CHECKS:
        connection.exec_driver_sql(statement)


def _leave(context: ExceptionContext) -> None:
    """A server that has become a standby is left: the address may lead to the new primary by now."""
    if is_read_only(context.original_exception):
        context.is_disconnect = True


def _look(connection: Any, _record: object, _fairy: object) -> None:
    """Whether the server has gone since: what comes unasked is its farewell. To ask, as SQLAlchemy would, is
    one more way there and back for each step.
    """
    connection.be_quick()
    unasked = select.poll()
    if not connection.closed:
        unasked.register(connection, select.POLLIN)
    if connection.closed or unasked.poll(0):
        raise DisconnectionError("the server has gone")
