"""Who asks to work here, and what is decided of it; the workers themselves are workers.py's.

A worker's token is derived from its registration secret, which only the worker has, so polling after
approval can be answered again and again while the file holds hashes only.

The same machine (``installId``) stays the same worker: asking again with a new secret makes a new request,
and approving that replaces the token of the worker already known.
"""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from sqlite3 import Connection

from studio_worker.errors import ProtocolError
from studio_worker.local_studio.database import Database, Row
from studio_worker.local_studio.waiting_room import WaitingRoom
from studio_worker.local_studio.workers import Workers, sha256
from studio_worker.studio import wire

MAX_PENDING = 100
"""Requests waiting for a decision at a time; anybody may ask, so the number is bounded."""


class TooManyPending(ProtocolError):
    """No further request is taken before some are decided."""


class UnknownRequest(ProtocolError):
    """The request id is unknown, or was replaced by a later one."""


class WrongSecret(ProtocolError):
    """The request exists, and the secret is not its own."""


class NotPending(ProtocolError):
    """The request was decided already."""


@dataclass(frozen=True)
class Registration:
    """One request. Times are Unix seconds; ``status`` is ``pending``, ``approved`` or ``rejected``."""

    request_id: str
    install_id: str
    secret_hash: str
    capabilities: wire.Capabilities
    user_agent: str
    status: str
    reason: str | None
    worker_id: str | None
    created_at: float
    decided_at: float | None


class Registry:
    """Registration requests. ``workers`` are those that were approved."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.workers = Workers(database, clock)
        self._database = database
        self._clock = clock
        self._room = WaitingRoom(clock())

    # --- the worker's side --------------------------------------------------------------------------

    def request(self, body: wire.RegisterRequest, origin: str = "") -> Registration:
        """The request of this machine, the standing one or a new one. Raises TooManyPending.

        Args:
            origin: where it comes from; where there are too many requests, one of whoever has the most of
                them makes room.
        """
        registration = self._request(body, origin)
        if registration.status == "pending":
            self._room.asked(registration.request_id, origin, self._clock())
        return registration

    def _request(self, body: wire.RegisterRequest, origin: str) -> Registration:
        secret_hash = body.registration_secret_hash.lower()
        with self._database.writing() as connection:
            last = self._last_of(body.install_id)
            if last is not None and self._still_stands(last, secret_hash):
                # A pending request takes the latest secret: a worker that lost its own starts over.
                connection.execute(
                    "UPDATE registrations SET secret_hash = ?, capabilities = ?, user_agent = ?"
                    " WHERE request_id = ?",
                    (secret_hash, body.capabilities.to_json(), body.user_agent, last.request_id),
                )
                return self._require(last.request_id)
            self._make_room(connection, origin)
            request_id = str(uuid.uuid4())
            connection.execute(
                "INSERT INTO registrations (request_id, install_id, secret_hash, capabilities, user_agent,"
                " status, created_at) VALUES (?, ?, ?, ?, ?, 'pending', ?)",
                (
                    request_id,
                    body.install_id,
                    secret_hash,
                    body.capabilities.to_json(),
                    body.user_agent,
                    self._clock(),
                ),
            )
            return self._require(request_id)

    def decision(self, request_id: str, secret: str) -> wire.Pending | wire.Approved | wire.Rejected:
        """What a poll is answered. Raises UnknownRequest or WrongSecret."""
        registration = self._require(request_id)
        if not hmac.compare_digest(sha256(secret), registration.secret_hash):
            raise WrongSecret("the registration secret is not this request's")
        if registration.status == "rejected":
            return wire.Rejected(reason=registration.reason)
        if registration.status == "pending":
            self._room.polled(request_id, self._clock())
            return wire.Pending()
        worker = self.workers.get(registration.worker_id or "")
        if worker is None or worker.request_id != request_id:
            raise UnknownRequest("the request was replaced, or its worker was deleted")
        message = f"{self._database.salt}:{request_id}".encode()
        token = hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()
        if worker.token_hash is None:
            self.workers.keep_token(worker.worker_id, token)
        return wire.Approved(worker_id=worker.worker_id, auth_token=token)

    # --- the people's side --------------------------------------------------------------------------

    def pending(self) -> list[Registration]:
        """Requests that wait for a decision, oldest first."""
        rows = self._database.rows(
            "SELECT * FROM registrations WHERE status = 'pending' ORDER BY created_at, request_id"
        )
        return [_registration(row) for row in rows]

    def approve(self, request_id: str) -> str:
        """Let the machine work here; returns its worker id. Raises UnknownRequest or NotPending."""
        with self._database.writing() as connection:
            registration = self._require_pending(request_id)
            row = self._database.row(
                "SELECT worker_id FROM workers WHERE install_id = ? AND deleted_at IS NULL",
                (registration.install_id,),
            )
            worker_id = str(uuid.uuid4()) if row is None else str(row["worker_id"])
            connection.execute(
                "INSERT INTO workers (worker_id, install_id, request_id, capabilities, created_at)"
                " VALUES (?, ?, ?, ?, ?) ON CONFLICT (worker_id) DO UPDATE"
                " SET request_id = excluded.request_id, token_hash = NULL",
                (
                    worker_id,
                    registration.install_id,
                    request_id,
                    registration.capabilities.to_json(),
                    self._clock(),
                ),
            )
            connection.execute(
                "UPDATE registrations SET status = 'approved', worker_id = ?, decided_at = ?"
                " WHERE request_id = ?",
                (worker_id, self._clock(), request_id),
            )
        return worker_id

    def reject(self, request_id: str, reason: str | None = None) -> None:
        """Refuse the machine. Raises UnknownRequest or NotPending."""
        with self._database.writing() as connection:
            self._require_pending(request_id)
            connection.execute(
                "UPDATE registrations SET status = 'rejected', reason = ?, decided_at = ?"
                " WHERE request_id = ?",
                (reason, self._clock(), request_id),
            )

    # --- within -------------------------------------------------------------------------------------

    def _make_room(self, connection: Connection, origin: str) -> None:
        rows = self._database.rows("SELECT request_id FROM registrations WHERE status = 'pending'")
        if len(rows) < MAX_PENDING:
            return
        goes = self._room.dispensable((row["request_id"] for row in rows), origin, self._clock())
        if goes is None:
            raise TooManyPending("too many requests wait for a decision; try again later")
        connection.execute("DELETE FROM registrations WHERE request_id = ?", (goes,))

    def _last_of(self, install_id: str) -> Registration | None:
        row = self._database.row(
            "SELECT * FROM registrations WHERE install_id = ? ORDER BY created_at DESC, rowid DESC LIMIT 1",
            (install_id,),
        )
        return None if row is None else _registration(row)

    def _still_stands(self, last: Registration, secret_hash: str) -> bool:
        if last.status == "pending":
            return True
        if last.secret_hash != secret_hash:
            return False
        return last.status == "rejected" or self.workers.get(last.worker_id or "") is not None

    def _require(self, request_id: str) -> Registration:
        row = self._database.row("SELECT * FROM registrations WHERE request_id = ?", (request_id,))
        if row is None:
            raise UnknownRequest("the registration request is unknown")
        return _registration(row)

    def _require_pending(self, request_id: str) -> Registration:
        registration = self._require(request_id)
        if registration.status != "pending":
            raise NotPending(f"the request was {registration.status} already")
        return registration


def _registration(row: Row) -> Registration:
    facts = dict(row) | {"capabilities": wire.Capabilities.model_validate_json(row["capabilities"])}
    return Registration(**facts)
