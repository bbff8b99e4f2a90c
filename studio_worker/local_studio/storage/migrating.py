"""Bringing a database to the present form of its tables, by the revisions in ``migrations``.

They are Alembic's, and run by its parts rather than by its command, which wants files of its own beside them.
"""

from __future__ import annotations

from pathlib import Path

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from studio_worker.errors import ConfigError

BEFORE_ALEMBIC = "0001"
"""The revision whose tables SQLite files had before they knew of revisions."""

_FOLDER = Path(__file__).parent / "migrations"


def migrate(connection: Connection, name: str, *, is_older: bool = False) -> None:
    """Take the steps that are left, within the transaction of this connection.

    Args:
        name: what people call the database.
        is_older: it has the tables of BEFORE_ALEMBIC, and does not know it.

    Raises:
        ConfigError: a later version of this program has been here.
    """
    scripts = ScriptDirectory(str(_FOLDER))
    context = MigrationContext.configure(connection)
    present = context.get_current_revision() or (BEFORE_ALEMBIC if is_older else "base")
    known = {script.revision for script in scripts.walk_revisions()}
    if present not in known | {"base"}:
        raise ConfigError(
            f"was written by a later version of this program (revision {present})",
            cure="use that version, or choose another database",
            source=name,
        )
    steps = list(scripts.iterate_revisions("head", present))
    with Operations.context(context):
        for step in reversed(steps):
            step.module.upgrade()
            context.stamp(scripts, step.revision)
    if is_older and not steps:
        context.stamp(scripts, present)
