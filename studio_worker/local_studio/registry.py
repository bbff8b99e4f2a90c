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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, insert, select, update

from studio_worker.errors import ProtocolError
from studio_worker.local_studio.storage import locks
from studio_worker.local_studio.storage.database import Database, upsert
from studio_worker.local_studio.storage.locks import Lock
from studio_worker.local_studio.storage.tables import registrations, workers
from studio_worker.local_studio.waiting_room import Asker, dispensable
from studio_worker.local_studio.workers import Workers, known_worker, sha256
from studio_worker.studio import wire

MAX_PENDING = 100
"""Requests waiting for a decision at a time; anybody may ask, so the number is bounded."""
_NOTED_S = 5.0
"""A poll so soon after another is not written down: anybody may poll as often as they like."""


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


_REGISTRATIONS = select(*(registrations.c[field.name] for field in fields(Registration)))
_IS_PENDING = registrations.c.status == "pending"
_PENDING = _REGISTRATIONS.where(_IS_PENDING).order_by(registrations.c.created_at, registrations.c.request_id)


class Registry:
    """Registration requests. ``workers`` are those that were approved."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.workers = Workers(database, clock)
        self._database = database
        self._clock = clock
        self._begun_at = clock()

    # --- the worker's side --------------------------------------------------------------------------

    def request(self, body: wire.RegisterRequest, origin: str = "") -> Registration:
        """The request of this machine, the standing one or a new one. Raises TooManyPending.

        Args:
            origin: where it comes from; where there are too many requests, one of whoever has the most of
                them makes room.
        """
        secret_hash = body.registration_secret_hash.lower()
        with self._database.writing() as connection:
            locks.take(connection, Lock.REGISTRATION)
            last = _last_of(connection, body.install_id)
            says = {
                "secret_hash": secret_hash,
                "capabilities": body.capabilities.to_json(),
                "user_agent": body.user_agent,
                "origin": origin,
                "heard_at": self._clock(),
            }
            if last is not None and _still_stands(connection, last, secret_hash):
                # A pending request takes the latest secret: a worker that lost its own starts over.
                _change(connection, last.request_id, **says)
                return _require(connection, last.request_id)
            self._make_room(connection, origin)
            request_id = str(uuid.uuid4())
            connection.execute(
                insert(registrations).values(
                    request_id=request_id,
                    install_id=body.install_id,
                    status="pending",
                    created_at=self._clock(),
                    has_polled=False,
                    **says,
                )
            )
            return _require(connection, request_id)

    def decision(self, request_id: str, secret: str) -> wire.Pending | wire.Approved | wire.Rejected:
        """What a poll is answered. Raises UnknownRequest or WrongSecret."""
        with self._database.reading() as connection:
            registration = _require(connection, request_id)
        if not hmac.compare_digest(sha256(secret), registration.secret_hash):
            raise WrongSecret("the registration secret is not this request's")
        if registration.status == "rejected":
            return wire.Rejected(reason=registration.reason)
        if registration.status == "pending":
            self._note_poll(request_id)
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
        with self._database.reading() as connection:
            rows = connection.execute(_PENDING).mappings()
            return [_registration(row) for row in rows]

    def approve(self, request_id: str) -> str:
        """Let the machine work here; returns its worker id. Raises UnknownRequest or NotPending."""
        with self._database.writing() as connection:
            locks.take(connection, Lock.REGISTRATION)
            registration = _require_pending(connection, request_id)
            same_machine = workers.c.install_id == registration.install_id
            known = connection.execute(
                select(workers.c.worker_id).where(same_machine, workers.c.deleted_at.is_(None))
            ).scalar()
            worker_id = known or str(uuid.uuid4())
            worker = {
                "worker_id": worker_id,
                "install_id": registration.install_id,
                "request_id": request_id,
                "token_hash": None,
                "capabilities": registration.capabilities.to_json(),
                "created_at": self._clock(),
            }
            upsert(connection, workers, worker, keep=("install_id", "capabilities", "created_at"))
            _change(connection, request_id, status="approved", worker_id=worker_id, decided_at=self._clock())
        return worker_id

    def reject(self, request_id: str, reason: str | None = None) -> None:
        """Refuse the machine. Raises UnknownRequest or NotPending."""
        with self._database.writing() as connection:
            locks.take(connection, Lock.REGISTRATION)
            _require_pending(connection, request_id)
            _change(connection, request_id, status="rejected", reason=reason, decided_at=self._clock())

    # --- within -------------------------------------------------------------------------------------

    def _note_poll(self, request_id: str) -> None:
        now = self._clock()
        with self._database.reading() as connection:
            asker = next(_askers(connection, registrations.c.request_id == request_id), None)
        if asker is None or (asker.has_polled and asker.heard_at > now - _NOTED_S):
            return
        with self._database.writing() as connection:
            _change(connection, request_id, heard_at=now, has_polled=True)

    def _make_room(self, connection: Connection, origin: str) -> None:
        waiting = list(_askers(connection, _IS_PENDING))
        if len(waiting) < MAX_PENDING:
            return
        # Nobody could be heard while the studio was away.
        heard = [replace(asker, heard_at=max(asker.heard_at, self._begun_at)) for asker in waiting]
        goes = dispensable(heard, origin, self._clock())
        if goes is None:
            raise TooManyPending("too many requests wait for a decision; try again later")
        connection.execute(delete(registrations).where(registrations.c.request_id == goes))


def _last_of(connection: Connection, install_id: str) -> Registration | None:
    # Of two that came at one moment the first was decided when the second came.
    return _find(
        connection,
        _REGISTRATIONS.where(registrations.c.install_id == install_id).order_by(
            registrations.c.created_at.desc(), registrations.c.decided_at.desc().nulls_first()
        ),
    )


def _still_stands(connection: Connection, last: Registration, secret_hash: str) -> bool:
    if last.status == "pending":
        return True
    if last.secret_hash != secret_hash:
        return False
    return last.status == "rejected" or known_worker(connection, last.worker_id or "") is not None


def _askers(connection: Connection, condition: ColumnElement[bool]) -> Iterator[Asker]:
    columns = (registrations.c[field.name] for field in fields(Asker))
    return (Asker(**row) for row in connection.execute(select(*columns).where(condition)).mappings())


def _require(connection: Connection, request_id: str) -> Registration:
    found = _find(connection, _REGISTRATIONS.where(registrations.c.request_id == request_id))
    if found is None:
        raise UnknownRequest("the registration request is unknown")
    return found


def _require_pending(connection: Connection, request_id: str) -> Registration:
    registration = _require(connection, request_id)
    if registration.status != "pending":
        raise NotPending(f"the request was {registration.status} already")
    return registration


def _find(connection: Connection, query: Select[Any]) -> Registration | None:
    row = connection.execute(query.limit(1)).mappings().first()
    return None if row is None else _registration(row)


def _change(connection: Connection, request_id: str, **values: Any) -> None:
    connection.execute(update(registrations).where(registrations.c.request_id == request_id).values(**values))


def _registration(row: Mapping[Any, Any]) -> Registration:
    facts = dict(row) | {"capabilities": wire.Capabilities.model_validate_json(row["capabilities"])}
    return Registration(**facts)
