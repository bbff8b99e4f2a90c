"""Whether the processes of one studio want the same token of people: each is told its own. Nobody is refused.

The database has a slow hash of the token that the last process to start was given, and no token.
"""

from __future__ import annotations

import hashlib
import logging

from sqlalchemy import select

from studio_worker.local_studio.pictures import CannotStore
from studio_worker.local_studio.presence import Presence
from studio_worker.local_studio.storage.database import Database, upsert
from studio_worker.local_studio.storage.tables import meta

logger = logging.getLogger(__name__)

_KEY = "token"
_SCRYPT = {"n": 2**14, "r": 8, "p": 5}
"""OWASP's password storage cheat sheet: 16 MiB, and some tenths of a second, once in a start."""


def compare_token(database: Database, presence: Presence, token: str | None) -> None:
    """Say so where others are at work and the last that started was given another token.

    Of a planned change, one process after the other, the first says a line and the rest none.
    """
    if not database.is_shared:
        return
    mark = hashlib.scrypt((token or "").encode(), salt=database.salt.encode(), **_SCRYPT).hex()
    try:
        with database.writing() as connection:
            before = connection.execute(select(meta.c.value).where(meta.c.key == _KEY)).scalar()
            upsert(connection, meta, {"key": _KEY, "value": mark})
        differs = before not in {None, mark} and presence.has_others()
    except CannotStore:
        return  # away just now: the pulse says so, and the next start compares
    if differs:
        logger.warning(
            "this studio's processes were started with different tokens",
            extra={"cure": "start the others anew with this one's --token-file, or this one with theirs"},
        )
