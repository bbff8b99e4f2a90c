"""What a PostgreSQL database's errors mean: for steps that are under way, and at the start, with a cure.

A server that lets nobody in gives no code to libpq, so its words are looked at. Those that are not known, in
another language say, count as what may pass: whoever watches the process tries again.
"""

from __future__ import annotations

import re

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, TimeoutError

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.local_studio.pictures import CannotStore, StorageAway, StorageFull

_DISK_FULL = "53100"
_READ_ONLY = "25006"
"""What a standby says."""
STANDS_STILL = "08006"
"""Connection failure: said in the place of a server that says nothing."""
_NOT_ALLOWED = "42501"
LOCKED = "55P03"
_CROSSED = ("40P01", "40001")
"""Two steps waited for each other, and one was given up."""
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


_CROWDED = r"too many (clients|connections)|remaining connection slots"
"""Whoever is in can go on."""


def told(error: DBAPIError) -> CannotStore | None:
    """What went wrong with a step, for the log; ``None`` of what only a fault in this program can bring."""
    code = code_of(error.orig)
    if code == _DISK_FULL:
        return StorageFull(f"the database takes no more data ({error.orig})")
    if code in (_NOT_ALLOWED, *_ANOTHERS):
        return StorageAway(f"the database does not let the studio work ({error.orig})")
    if code in _CROSSED:
        return StorageAway(f"another step was in the way, and this one was given up ({error.orig})")
    if re.search(_CROWDED, str(error.orig)):
        return StorageAway(f"the database takes no more connections ({error.orig})")
    if code == LOCKED:
        return StorageAway(f"somebody else keeps what this step needs ({error.orig})")
    if code == _READ_ONLY:
        return StorageAway(f"the database takes nothing now ({error.orig})")
    if isinstance(error, OperationalError | InterfaceError):
        return StorageAway(f"the database does not answer ({error.orig})")
    return None


def is_everybodys(error: DBAPIError) -> bool:
    """Whether other steps would fail, or wait in vain, just the same: of the server, or of a whole table."""
    code = code_of(error.orig)
    if code == LOCKED:
        # With the row that it was waiting for, if it was one; tables have no context, nor has a turn, for
        # which nobody waits but who is to be offered a job.
        if "pg_advisory" in (error.statement or ""):
            return False
        return getattr(getattr(error.orig, "diag", None), "context", None) is None
    if code is None:  # nobody let in; what breaks in the middle of a step may be this one connection
        is_let_in = error.statement is not None or re.search(_CROWDED, str(error.orig))
        return isinstance(error, OperationalError) and not is_let_in
    return code in (_READ_ONLY, STANDS_STILL)


def is_read_only(error: BaseException | None) -> bool:
    """Whether a server says that it takes nothing: a standby, or one that was told so."""
    return code_of(error) == _READ_ONLY


def code_of(error: BaseException | None) -> str | None:
    """The server's, where it gave one."""
    code: str | None = getattr(error, "sqlstate", None)
    return code


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
    code = code_of(getattr(error, "orig", None))
    if code == _DISK_FULL:
        return StateUnavailable(f"takes no more data ({said})", cure="make room on its disk", source=name)
    if code == _READ_ONLY:
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
