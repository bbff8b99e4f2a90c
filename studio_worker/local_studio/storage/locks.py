"""What only one studio process at a time may do, however many have the same database."""

from __future__ import annotations

from enum import IntEnum

from sqlalchemy import Connection, bindparam, func, select


class Lock(IntEnum):
    """By a number that nothing else takes that uses the same PostgreSQL database."""

    MIGRATION = 0x53_54_55_01
    TURNS = 0x53_54_55_02
    REGISTRATION = 0x53_54_55_03


_TAKE = select(func.pg_advisory_xact_lock(bindparam("number")))


def take(connection: Connection, lock: Lock) -> None:
    """Wait for it; it is given back with the end of the transaction. SQLite has one that writes at a time."""
    if connection.dialect.name == "postgresql":
        connection.execute(_TAKE, {"number": int(lock)})
