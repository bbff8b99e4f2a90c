"""One open database, whichever it is: transactions, and who hears of them. Tables are their owners' matter.

Whoever asks gets a connection for a while: :meth:`Database.reading` or :meth:`Database.writing`. One within
the other would wait for itself where there is one connection only, so a step hands its connection on.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Table,
    Update,
    extract,
    func,
    literal,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from studio_worker.local_studio.pictures import StorageAway
from studio_worker.local_studio.storage.tables import meta

_Insert = sqlite.Insert | postgresql.Insert
_INSERTS: dict[str, Callable[[Table], _Insert]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

SERVER_TIME = select(extract("epoch", func.clock_timestamp()))
"""What PostgreSQL's own clock says: several machines need not agree on theirs."""

WRITES = "studio_writes"
"""The option of connections that have a transaction which changes something."""


class Database:
    """What the makes of databases have in common. ``close`` is called once, last.

    Args:
        engine: knows how to connect; the tables are there and in their present form.
        on_change: called after every committed write, when no connection is held.
        translated: turns what the driver raises into this package's errors.
        single: the same where each statement is a transaction by itself, as one that only reads may be.
    """

    is_shared = False
    """Whether other studio processes have it open at the same time."""

    last_opened_at = float("inf")
    """When a studio opened it before this one; infinitely late where none did, or others have it open."""

    def __init__(
        self,
        engine: Engine,
        on_change: Callable[[], None],
        translated: Callable[[], AbstractContextManager[None]],
        single: Engine | None = None,
    ) -> None:
        self.on_change = on_change
        self._engine = engine
        self._reader = single or engine
        self._writer = engine.execution_options(**{WRITES: True})
        self._single = single or self._writer
        self._translated = translated
        self._is_closed = False
        with self.writing() as connection:
            new = {"key": "salt", "value": secrets.token_hex(32)}
            self.is_new = insert_new(connection, meta, new)
            self.salt: str = connection.execute(select(meta.c.value).where(meta.c.key == "salt")).scalar_one()

    def close(self) -> None:
        """Nothing may be asked afterwards."""
        self._is_closed = True
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees what was committed."""
        with self._translated(), self._reader.connect() as connection:
            self._require_open()
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction, all or nothing; listeners hear of it after the commit. Raises StorageFull."""
        with self._translated(), self._writer.begin() as connection:
            self._require_open()
            yield connection
        self.on_change()

    def change(self, statement: Update, values: Mapping[str, Any], *, is_news: bool) -> bool:
        """One statement that is a transaction by itself; listeners hear only of what is news.

        Returns:
            Whether there was a row to change.
        """
        with self._translated(), self._single.begin() as connection:
            self._require_open()
            has_changed = connection.execute(statement, dict(values)).rowcount > 0
        if is_news:
            self.on_change()
        return has_changed

    def check(self) -> None:
        """Whether it answers; raises what it raises."""
        with self.reading() as connection:
            connection.execute(select(literal(1)))

    def _require_open(self) -> None:
        # Here, with a connection in hand: who waited for one while the last went would open the next.
        if self._is_closed:
            raise StorageAway("the studio was stopped")


def upsert(
    connection: Connection,
    table: Table,
    values: Mapping[str, Any],
    *,
    keep: Sequence[str] = (),
    add: Sequence[str] = (),
) -> None:
    """Insert a row, or change the one of the same primary key.

    Args:
        keep: columns that stay as they are in a row that is there.
        add: columns whose value is added to what is there.
    """
    statement = _upsert(connection.dialect.name, table, tuple(values), tuple(keep), tuple(add))
    connection.execute(statement, dict(values))


def insert_new(connection: Connection, table: Table, values: Mapping[str, Any]) -> bool:
    """Insert a row unless there is one of the same key; whether there was none."""
    return connection.execute(_insert_new(connection.dialect.name, table), dict(values)).first() is not None


@cache
def _insert_new(dialect: str, table: Table) -> Executable:
    return _INSERTS[dialect](table).on_conflict_do_nothing().returning(*table.primary_key)


@cache
def _upsert(
    dialect: str, table: Table, names: tuple[str, ...], keep: tuple[str, ...], add: tuple[str, ...]
) -> _Insert:
    key = [column.name for column in table.primary_key]
    statement = _INSERTS[dialect](table)
    changed: dict[str, ColumnElement[Any]] = {
        name: statement.excluded[name] for name in names if name not in (*key, *keep)
    }
    changed |= {name: table.c[name] + statement.excluded[name] for name in add}
    return statement.on_conflict_do_update(index_elements=key, set_=changed)
