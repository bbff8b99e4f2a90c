"""Bringing a database to the present form of its tables, by Alembic's revisions in ``migrations``."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from studio_worker.errors import ConfigError

BEFORE_ALEMBIC = "0001"
"""The revision whose tables SQLite files had before they knew of revisions."""

_FOLDER = Path(__file__).parent / "migrations"


def migrate(connection: Connection, name: str, *, is_older: bool = False) -> bool:
    """Take the steps that are left, within the transaction of this connection; whether there were any.

    Args:
        name: what people call the database.
        is_older: it has the tables of BEFORE_ALEMBIC, and does not know it.

    Raises:
        ConfigError: a later version of this program has been here.
    """
    scripts = ScriptDirectory(str(_FOLDER))
    present = MigrationContext.configure(connection).get_current_heads()
    known = {script.revision for script in scripts.walk_revisions()}
    for revision in present:
        if revision not in known:
            raise ConfigError(
                f"was written by a later version of this program (revision {revision})",
                cure="use that version, or choose another database",
                source=name,
            )
    if set(present) == set(scripts.get_heads()):
        return False
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    if is_older and not present:
        command.stamp(config, BEFORE_ALEMBIC)
    command.upgrade(config, "head")
    return True
