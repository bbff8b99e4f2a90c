"""Who works here: approved workers, and what their tokens are worth. No token is kept, only its hash."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from studio_worker.local_studio.database import Database, Row
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


class Workers:
    """Approved workers; requests to become one are registry.py's."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def all(self) -> list[RegisteredWorker]:
        """All workers that were not deleted, oldest first."""
        rows = self._database.rows("SELECT * FROM workers WHERE deleted_at IS NULL ORDER BY created_at")
        return [_worker(row) for row in rows]

    def get(self, worker_id: str) -> RegisteredWorker | None:
        """One worker that was not deleted."""
        row = self._database.row(
            "SELECT * FROM workers WHERE worker_id = ? AND deleted_at IS NULL", (worker_id,)
        )
        return None if row is None else _worker(row)

    def names(self) -> dict[str, str]:
        """What people call each worker, deleted ones too: old pictures still name their maker."""
        return {row["worker_id"]: _worker(row).name for row in self._database.rows("SELECT * FROM workers")}

    def delete(self, worker_id: str) -> bool:
        """Dismiss a worker; its token is remembered, so that it can be told. False where it is unknown."""
        with self._database.writing() as connection:
            cursor = connection.execute(
                "UPDATE workers SET deleted_at = ? WHERE worker_id = ? AND deleted_at IS NULL",
                (self._clock(), worker_id),
            )
            return cursor.rowcount == 1

    def keep_token(self, worker_id: str, token: str) -> None:
        """Note which token the worker has fetched, by its hash."""
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE workers SET token_hash = ? WHERE worker_id = ?", (sha256(token), worker_id)
            )

    def standing(self, worker_id: str, token: str) -> Standing:
        """What this id and token are worth, compared in constant time."""
        row = self._database.row(
            "SELECT token_hash, deleted_at FROM workers WHERE worker_id = ?", (worker_id,)
        )
        if row is None or not hmac.compare_digest(sha256(token), row["token_hash"] or ""):
            return Standing.REFUSED
        return Standing.KNOWN if row["deleted_at"] is None else Standing.DELETED

    def seen(self, worker_id: str, capabilities: wire.Capabilities) -> None:
        """Note a sign of life and what the worker says of itself."""
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE workers SET last_seen_at = ?, capabilities = ? WHERE worker_id = ?",
                (self._clock(), capabilities.to_json(), worker_id),
            )


def sha256(text: str) -> str:
    """In hex."""
    # Over the text's own characters (protocol: the secret's 64 ASCII characters, not its bytes).
    return hashlib.sha256(text.encode()).hexdigest()


def _worker(row: Row) -> RegisteredWorker:
    facts = dict(row) | {"capabilities": wire.Capabilities.model_validate_json(row["capabilities"])}
    return RegisteredWorker(**facts)
