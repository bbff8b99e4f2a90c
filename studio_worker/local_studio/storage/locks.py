"""What one studio process at a time may do, however many have the same database, and how others wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, select
from sqlalchemy.exc import OperationalError

from studio_worker.local_studio.storage.postgres_trouble import LOCKED, code_of


class Lock(IntEnum):
    """By a number that nothing else takes that uses the same PostgreSQL database."""

    MIGRATION = 0x53_54_55_01
    TURNS = 0x53_54_55_02
    REGISTRATION = 0x53_54_55_03


_TURNS_MS = 500
_TAKE = select(func.pg_advisory_xact_lock(bindparam("number")))
_TRY = select(func.pg_try_advisory_xact_lock(bindparam("number")))


def take(connection: Connection, lock: Lock) -> None:
    """Wait for it; it is given back with the end of the transaction. SQLite has one that writes at a time."""
    if connection.dialect.name == "postgresql":
        connection.execute(_TAKE, {"number": int(lock)})


def take_turns(connection: Connection) -> None:
    """Be the one that gives a job away. Whoever has them stands still if they do not come soon: a turn takes
    milliseconds, and sessions wait for it on the event loop.
    """
    if connection.dialect.name == "postgresql" and not is_free(connection, Lock.TURNS):
        with _waiting_for(connection, _TURNS_MS):
            take(connection, Lock.TURNS)


def is_free(connection: Connection, lock: Lock) -> bool:
    """Whether nobody has it in hand; it is this transaction's then."""
    return connection.execute(_TRY, {"number": int(lock)}).scalar_one() is True


def be_patient(connection: Connection) -> None:
    """A step with much to do waits for the server, and for whoever locks what it needs, for an hour at most.

    Args:
        connection: in a transaction, with which this is over.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = '1h'")
        look_at_all(connection)


def look_at_all(connection: Connection) -> None:
    """Who looks at everything, not on the event loop, may take long; with this connection that is over."""
    if connection.dialect.name == "postgresql":
        connection.connection.dbapi_connection.be_patient()  # type: ignore[union-attr]


_SETTLES_MS = 1000
"""Most steps take a millisecond; a process that hangs in one of its own is not to hold up all others."""


def settled(connection: Connection, locked: Select[Any], asked: Mapping[str, Any]) -> bool:
    """Wait until the steps that have these rows in hand are through; the rows are this transaction's then.

    Returns:
        Whether they are; not, where somebody keeps one for long.
    """
    if connection.dialect.name != "postgresql":
        return True  # nobody else writes
    with _waiting_for(connection, _SETTLES_MS):
        try:
            with connection.begin_nested():
                connection.execute(locked, asked)
        except OperationalError as error:
            if code_of(error.orig) != LOCKED:
                raise
            return False
        return True


@contextmanager
def _waiting_for(connection: Connection, limit_ms: int) -> Iterator[None]:
    """No longer than this for whoever has what is asked for in here."""
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{limit_ms}ms'")
    yield
    # Not where it failed: the transaction is over, and this with it.
    connection.exec_driver_sql("SET LOCAL lock_timeout TO DEFAULT")
