"""What an operator calls the places of a studio: a data folder, a database, what keeps the pictures.

No secret is taken from the command line, where every user of the machine can read it: passwords come from
where libpq and S3's programs look for them.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures import pictures_at
from studio_worker.local_studio.places import DATABASE_NAME, Places
from studio_worker.local_studio.storage.postgres import url_of

_NEARLY = ("postgresql:", "postgres:")
"""How no file is called: an address that was mistyped."""


def places_of(data: Path, database: str | None = None, pictures: str | None = None) -> Places:
    """Where one studio keeps its state.

    Args:
        data: where what is not named lies.
        database: a SQLite file, or an address like ``postgresql://USER@HOST/NAME``.
        pictures: a folder, or an address like ``s3://BUCKET/PREFIX``.

    Raises:
        ConfigError: an address is none or holds a password, or a library is not installed.
    """
    return Places(_database(data, database), None if pictures is None else pictures_at(pictures))


def _database(data: Path, named: str | None) -> Path | str:
    if named is None:
        return data / DATABASE_NAME
    if "://" not in named and not named.startswith(_NEARLY):
        if not Path(named).name:  # nothing at all, or a folder
            raise ConfigError(
                "names no file",
                cure="name a file, or leave it out and name a folder with --data",
                key="--database",
            )
        return Path(named)
    try:
        parts = urlsplit(named)
        has_password = parts.password is not None or "password" in parse_qs(parts.query)
    except ValueError:
        has_password = False  # no address at all, as is told below
    if has_password:
        raise ConfigError(
            "a password in an address can be read by every user of this machine",
            cure="leave it out, and give it in ~/.pgpass, or in the environment as PGPASSWORD or PGPASSFILE",
            key="--database",
        )
    url_of(named)
    return named
