"""The rows of a studio on their way to another database: which one counts as empty, and who is at it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping

from sqlalchemy import Connection, Table, delete, func, insert, select

from studio_worker.errors import ConfigError
from studio_worker.local_studio.leases import LEASE_S
from studio_worker.local_studio.places import OWNER
from studio_worker.local_studio.shelf import Model
from studio_worker.local_studio.storage.database import SERVER_TIME, upsert
from studio_worker.local_studio.storage.tables import METADATA, files, meta, models, processes, results
from studio_worker.local_studio.studio import PLACEHOLDER

_ROWS = 500
"""At a time in memory."""
_ATTEMPT = "carrying"
"""The row of ``meta`` that says which attempt is at work on an empty database, and when the first began."""

Tell = Callable[[str], None]


def begin_attempt(writing: Connection) -> tuple[str, float | None]:
    """Say that an attempt is at work; of two the later one has the database.

    Returns:
        What :func:`require_alone` knows it by; and when the first one began, where it is not this one.
    """
    before = writing.execute(select(meta.c.value).where(meta.c.key == _ATTEMPT)).scalar()
    # A storage may know when pictures came to the second only.
    since = time.time() // 1 - 1 if before is None else float(before.partition(" ")[2])
    attempt = f"{secrets.token_hex(8)} {since}"
    # Another attempt that is about to end has this row in hand.
    upsert(writing, meta, {"key": _ATTEMPT, "value": attempt})
    return attempt, None if before is None else since


def require_alone(writing: Connection, attempt: str) -> None:
    """Until the end of the transaction. Raises ConfigError where another attempt has begun meanwhile."""
    mine = select(meta.c.value).where(meta.c.key == _ATTEMPT).with_for_update()
    if writing.execute(mine).scalar() != attempt:
        raise ConfigError("another attempt has begun meanwhile", cure="let that one end", key="--database")


def require_empty(connection: Connection, *, is_shared: bool) -> None:
    """Nothing is there but what a first start makes, and nobody at work. Raises ConfigError."""
    if is_shared:  # else whoever has the file open is alone
        since = float(connection.execute(SERVER_TIME).scalar_one()) - LEASE_S
        if connection.execute(select(processes).where(processes.c.beat_at >= since)).first() is not None:
            raise ConfigError(
                "a studio is at work on the database there",
                cure=f"stop it first; one that was killed counts for {LEASE_S:.0f} s more",
                key="--database",
            )
    for table in METADATA.sorted_tables:
        if table not in (meta, processes):
            _require_empty(connection, table)


def _require_empty(connection: Connection, table: Table) -> None:
    rows = connection.execute(select(table).limit(2)).mappings().all()
    if rows and not (table is models and all(Model(**row) == PLACEHOLDER for row in rows)):
        raise ConfigError(
            f"the database there is not empty: it has {table.name}",
            cure="name a new one, or drop it and make it anew",
            key="--database",
        )


def copy_rows(
    reading: Connection, writing: Connection, owner: str, moved: Mapping[str, str], tell: Tell
) -> None:
    """All there are, in the place of those of a first start.

    Args:
        owner: what the new database marks its pictures with.
        moved: keys of pictures, by what they were.
        tell: how far it is, a line each.
    """
    for table in (meta, models, processes):
        writing.execute(delete(table))
    for table in METADATA.sorted_tables:
        if table is meta:
            rows = reading.execute(select(meta)).mappings()
            facts = {row["key"]: row["value"] for row in rows} | {OWNER: owner}
            facts.pop(_ATTEMPT, None)
            writing.execute(insert(meta), [{"key": key, "value": value} for key, value in facts.items()])
        elif table is not processes:  # none is at work while a studio is carried
            _copy(table, reading, writing, moved, tell)


def _copy(
    table: Table, reading: Connection, writing: Connection, moved: Mapping[str, str], tell: Tell
) -> None:
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
