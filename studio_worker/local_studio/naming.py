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
    if "://" not in named:
        return Path(named)
    try:
        parts = urlsplit(named)
        has_password = parts.password is not None or "password" in parse_qs(parts.query)
    except ValueError:
        has_password = True  # whatever it is, it is not to be shown
    if has_password:
        raise ConfigError(
            "a password in an address can be read by every user of this machine",
            cure="leave it out, and give it in ~/.pgpass, or in the environment as PGPASSWORD or PGPASSFILE",
            key="--database",
        )
    return named
