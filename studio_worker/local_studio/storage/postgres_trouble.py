"""Why a PostgreSQL database cannot be used at the start, with a cure: what may pass by itself, and what not.

A server that lets nobody in gives no code to libpq, so its words are looked at. Those that are not known, in
another language say, count as what may pass: whoever watches the process tries again.
"""

from __future__ import annotations

import re

from sqlalchemy import Connection
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError

from studio_worker.errors import ConfigError, StateUnavailable

DISK_FULL = "53100"
READ_ONLY = "25006"
"""What a standby says."""
_NOT_ALLOWED = "42501"
_ANOTHERS = ("42P07", "42703", "42P01")
"""A table is there already, or is not as this program makes it.

All from https://www.postgresql.org/docs/current/errcodes-appendix.html.
"""

_PASSWORD = "give its password in ~/.pgpass, or in the environment as PGPASSWORD or PGPASSFILE"
_WORDS = (
    (r"password authentication failed|no password supplied", _PASSWORD),
    (r"role .* does not exist", "make that user, or name another one in the address"),
    (r"database .* does not exist", "make it (createdb --encoding=UTF8), or name another one"),
    (r"permission denied for database", "let the user in (GRANT CONNECT), or name another one"),
    (r"authentication failed|pg_hba\.conf", "let this user and machine in, in the server's pg_hba.conf"),
    (r"invalid \S+ value|invalid connection option|invalid port|invalid integer", "correct the address"),
    (r"certificate|does not support SSL", "see to sslmode and sslrootcert, and to the server's certificate"),
)
"""Of libpq and the server, and what to do about it; the first that is found."""


def require_unicode(connection: Connection, name: str) -> None:
    """Raises ConfigError where the database cannot hold what people write."""
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding != "UTF8":
        raise ConfigError(
            f"its encoding is {encoding}, which cannot hold every prompt",
            cure="make one in UTF-8: createdb --encoding=UTF8 --template=template0 NAME",
            source=name,
        )


def unusable(error: BaseException, name: str) -> ConfigError:
    """What went wrong at the start, for an operator.

    Args:
        name: of the database; there is no password in it.
    """
    said = " ".join(str(getattr(error, "orig", error)).split())
    code = getattr(getattr(error, "orig", None), "sqlstate", None)
    if code == DISK_FULL:
        return StateUnavailable(f"takes no more data ({said})", cure="make room on its disk", source=name)
    if code == READ_ONLY:
        return StateUnavailable(
            f"takes nothing now ({said})",
            cure="name the server that is not a standby, or end default_transaction_read_only",
            source=name,
        )
    if code == _NOT_ALLOWED:
        cure = "let the user make tables there, best as the owner of the database"
        return ConfigError(f"does not let the user work ({said})", cure=cure, source=name)
    if code in _ANOTHERS:
        cure = "name a database that is the studio's alone"
        return ConfigError(f"holds tables that are not this studio's ({said})", cure=cure, source=name)
    for words, cure in _WORDS if code is None else ():
        if re.search(words, said):
            return ConfigError(f"cannot be used ({said})", cure=cure, source=name)
    if isinstance(error, OperationalError | InterfaceError | TimeoutError):
        cure = "see that the server runs at this address, and to the network"
        return StateUnavailable(f"does not answer ({said})", cure=cure, source=name)
    cure = "name a database that is the studio's alone, whose user may make tables in it"
    return ConfigError(f"cannot be used ({said})", cure=cure, source=name)
