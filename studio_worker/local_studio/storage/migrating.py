"""Bringing a database to the present form of its tables, by the revisions in ``migrations``.

They are Alembic's, and run by its parts rather than by its command, which wants files of its own beside them.
Each says in ``OLDEST_WRITER`` which programs may go on with what it leaves: those that know that revision. A
row of ``meta`` tells it to those that do not know the newest one, so that a version may be taken back, or be
started again beside a newer one.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, select

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.local_studio.leases import DEAD_S
from studio_worker.local_studio.storage.database import SERVER_TIME, upsert
from studio_worker.local_studio.storage.tables import meta, processes

BEFORE_ALEMBIC = "0001"
"""The revision whose tables SQLite files had before they knew of revisions."""

OLDEST_WRITER = "oldest_writer"
"""The key in ``meta``."""

_ASKED = select(meta.c.value).where(meta.c.key == OLDEST_WRITER)

MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(connection: Connection, name: str, *, is_older: bool = False) -> None:
    """Take the steps that are left, within the transaction of this connection: none, where a later version
    has been here that lets this one go on.

    Args:
        name: what people call the database.
        is_older: it has the tables of BEFORE_ALEMBIC, and does not know it.

    Raises:
        ConfigError: a later version has been here that does not.
        StateUnavailable: studio processes are at work that could not go on.
    """
    scripts = ScriptDirectory(str(MIGRATIONS))
    context = MigrationContext.configure(connection)
    present = context.get_current_revision() or (BEFORE_ALEMBIC if is_older else "base")
    known = {script.revision: script.module for script in scripts.walk_revisions()}
    if present not in {"base", *known}:
        _require_let_in(connection, name, present, known)
        return
    oldest_writer = next(iter(known.values())).OLDEST_WRITER
    steps = list(scripts.iterate_revisions("head", present))
    if steps and present != "base":
        _require_nobody_shut_out(connection, name, present, oldest_writer)
    with Operations.context(context):
        for step in reversed(steps):
            step.module.upgrade()
            context.stamp(scripts, step.revision)
    if is_older and not steps:
        context.stamp(scripts, present)
    upsert(connection, meta, {"key": OLDEST_WRITER, "value": oldest_writer})


def require_own_form(connection: Connection, name: str) -> None:
    """For who copies all there is: he must know all. Raises ConfigError where a later version has been here,
    though it lets this one go on.
    """
    present = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory(str(MIGRATIONS))
    if present not in {script.revision for script in scripts.walk_revisions()}:
        raise _later(name, present)


def _require_let_in(connection: Connection, name: str, present: str, known: Collection[str]) -> None:
    if connection.execute(_ASKED).scalar() not in known:
        raise _later(name, present)


def _require_nobody_shut_out(connection: Connection, name: str, present: str, oldest_writer: str) -> None:
    if connection.dialect.name != "postgresql":
        return  # one studio at a time has the file
    before = connection.execute(_ASKED).scalar() or present
    if before == oldest_writer or not inspect(connection).has_table(processes.name):
        return
    since = float(connection.execute(SERVER_TIME).scalar_one()) - DEAD_S
    living = select(processes.c.address).where(processes.c.beat_at > since).order_by(processes.c.address)
    addresses = connection.execute(living).scalars().all()
    if addresses:
        raise StateUnavailable(
            f"is used by processes of an earlier version ({', '.join(addresses)}), which cannot go on with"
            " what this one makes of it",
            cure="stop them first",
            source=name,
        )


def _later(name: str, present: str | None) -> ConfigError:
    return ConfigError(
        f"was written by a later version of this program (revision {present})",
        cure="use that version, or later ones; the way back is a backup from before it",
        source=name,
    )
