"""Who works here: approved workers, and what their tokens are worth. No token is kept, only its hash."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select, update

from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.tables import sessions, workers
from studio_worker.studio import wire


class Standing(StrEnum):
    """What a worker id and token are worth."""

    KNOWN = "known"
    DELETED = "deleted"
    REFUSED = "refused"


@dataclass(frozen=True)
class RegisteredWorker:
    """One approved worker. Times are Unix seconds; ``token_hash`` is unset until it fetched its token."""

    worker_id: str
    install_id: str
    request_id: str
    token_hash: str | None
    capabilities: wire.Capabilities
    created_at: float
    last_seen_at: float | None
    deleted_at: float | None

    @property
    def name(self) -> str:
        """What people call it."""
        return self.capabilities.machine_name or self.worker_id[:8]


_COLUMNS = (
    *(workers.c[field.name] for field in fields(RegisteredWorker) if field.name != "last_seen_at"),
    func.coalesce(sessions.c.heartbeat_at, workers.c.last_seen_at).label("last_seen_at"),
)


class Workers:
    """Approved workers; requests to become one are registry.py's."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def all(self) -> list[RegisteredWorker]:
        """All workers that were not deleted, oldest first."""
        with self._database.reading() as connection:
            return _found(connection, workers.c.deleted_at.is_(None))

    def get(self, worker_id: str) -> RegisteredWorker | None:
        """One worker that was not deleted."""
        with self._database.reading() as connection:
            return known_worker(connection, worker_id)

    def names(self) -> dict[str, str]:
        """What people call each worker, deleted ones too: old pictures still name their maker."""
        with self._database.reading() as connection:
            return {worker.worker_id: worker.name for worker in _found(connection)}

    def delete(self, worker_id: str) -> bool:
        """Dismiss a worker; its token is remembered, so that it can be told. False where it is unknown."""
        with self._database.writing() as connection:
            known = update(workers).where(workers.c.worker_id == worker_id, workers.c.deleted_at.is_(None))
            return connection.execute(known.values(deleted_at=self._clock())).rowcount == 1

    def keep_token(self, worker_id: str, token: str) -> None:
        """Note which token the worker has fetched, by its hash."""
        with self._database.writing() as connection:
            known = update(workers).where(workers.c.worker_id == worker_id)
            connection.execute(known.values(token_hash=sha256(token)))

    def standing(self, worker_id: str, token: str) -> Standing:
        """What this id and token are worth, compared in constant time."""
        known = select(workers.c.token_hash, workers.c.deleted_at).where(workers.c.worker_id == worker_id)
        with self._database.reading() as connection:
            row = connection.execute(known).first()
        if row is None or not hmac.compare_digest(sha256(token), row.token_hash or ""):
            return Standing.REFUSED
        return Standing.KNOWN if row.deleted_at is None else Standing.DELETED


def note_seen(connection: Connection, worker_id: str, capabilities: wire.Capabilities, now: float) -> None:
    """A sign of life, and what the worker says of itself; part of a step."""
    known = update(workers).where(workers.c.worker_id == worker_id)
    connection.execute(known.values(last_seen_at=now, capabilities=capabilities.to_json()))


def known_worker(connection: Connection, worker_id: str) -> RegisteredWorker | None:
    """One worker that was not deleted, as part of a step."""
    found = _found(connection, workers.c.worker_id == worker_id, workers.c.deleted_at.is_(None))
    return found[0] if found else None


def sha256(text: str) -> str:
    """In hex."""
    # Over the text's own characters (protocol: the secret's 64 ASCII characters, not its bytes).
    return hashlib.sha256(text.encode()).hexdigest()


def _found(connection: Connection, *conditions: ColumnElement[bool]) -> list[RegisteredWorker]:
    found = select(*_COLUMNS).outerjoin(sessions, sessions.c.worker_id == workers.c.worker_id)
    found = found.where(*conditions).order_by(workers.c.created_at, workers.c.worker_id)
    return [_worker(row) for row in connection.execute(found).mappings()]


def _worker(row: Mapping[Any, Any]) -> RegisteredWorker:
    facts = dict(row) | {"capabilities": wire.Capabilities.model_validate_json(row["capabilities"])}
    return RegisteredWorker(**facts)
