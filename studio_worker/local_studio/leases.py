"""Whose a session is, and when a claim is lost with it: pure functions, no clock, no database, no socket.

A worker has one session at a time, wherever it is connected; each new one has the next number. A claim
belongs to a session, and so for as long as its lease runs: every heartbeat renews it. A session that ends
because its *studio process* died or was stopped keeps its claims until the lease runs out, for the worker
comes back within a second; one that the worker left is over at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from studio_worker.errors import ProtocolError
from studio_worker.local_studio.rules import LOST_CONNECTION, RESTARTED
from studio_worker.studio import wire

LEASE_S = 45.0
"""A silent session is closed after 30 s; a worker that dials again waits 30 s at most between two tries."""
BEAT_S = 5.0
"""So often a studio process says that it lives."""
DEAD_S = 15.0
"""A process that has missed three of its beats counts as dead."""


class Replaced(ProtocolError):
    """The session is not its worker's any more; ``code`` is what the worker is to be told."""

    def __init__(self, code: wire.ErrorCode) -> None:
        super().__init__(f"the session is over ({code})")
        self.code = code


@dataclass(frozen=True)
class Session:
    """A worker's session, the present one or the last.

    ``process_id`` is the studio process that has it; ``None`` where nobody has. ``end_code`` says why the
    studio ended it, where it did.
    """

    number: int
    process_id: str | None
    lease_until: float
    end_code: wire.ErrorCode | None = None


@dataclass(frozen=True)
class Loss:
    """Why a claim is let go, and whether that counts as an attempt."""

    reason: str
    counts: bool


WORKER_LEFT = Loss(LOST_CONNECTION, counts=True)
STUDIO_LEFT = Loss(RESTARTED, counts=False)
OFFER_LOST = Loss(LOST_CONNECTION, counts=False)
"""It was on its way when the connection broke, or its process died a moment ago: the worker has not tried."""


def begun(before: Session | None, process_id: str, now: float, lease_s: float = LEASE_S) -> Session:
    """The worker has said hello; whatever session it had is replaced."""
    return Session(1 if before is None else before.number + 1, process_id, now + lease_s)


def renewed(session: Session | None, number: int, now: float, lease_s: float = LEASE_S) -> Session:
    """A heartbeat came over the session of this number. Raises Replaced where that is not the present one."""
    if session is None or session.number != number:
        raise Replaced((session and session.end_code) or "duplicate_worker")
    return replace(session, lease_until=now + lease_s)


def handed_over(session: Session, now: float, lease_s: float = LEASE_S) -> Session:
    """Its process is being stopped: the worker has until the lease runs out to come back elsewhere."""
    return replace(session, process_id=None, lease_until=now + lease_s)


def dismissed(session: Session, code: wire.ErrorCode) -> Session:
    """The studio ends it, wherever it is: its number is nobody's from now on."""
    return replace(session, number=session.number + 1, process_id=None, end_code=code)


def loss_on_return(before: Session | None, living: Collection[str], *, is_accepted: bool) -> Loss:
    """What becomes of a claim that the worker had before this session, where it does not know of it any more.

    Args:
        living: the studio processes that are alive, or died so lately that nobody knows.
        is_accepted: whether the worker said that it has it.
    """
    if before is None or before.process_id not in living:
        return STUDIO_LEFT
    return WORKER_LEFT if is_accepted else OFFER_LOST


def loss_by(claim_number: int, session: Session | None, living: Collection[str], now: float) -> Loss | None:
    """Whether, and how, a claim made or taken over by the session ``claim_number`` is lost by now.

    Args:
        session: the worker's present or last one.
        living: the studio processes that are alive.
    """
    if session is None or claim_number < session.number:
        return STUDIO_LEFT  # a process died between two steps: each session takes over what is its worker's
    if now <= session.lease_until:
        return None
    return WORKER_LEFT if session.process_id in living else STUDIO_LEFT
