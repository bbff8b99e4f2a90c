"""The rules of one session as a class without a socket and without a clock.

Messages go in, frames and events come out; whoever holds the socket (``session.py``) only carries them.
One instance lives as long as one connection. Times are monotonic seconds, handed in.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from studio_worker.errors import DuplicateWorker, FrameError, ProtocolError, RefusedByStudio
from studio_worker.plain import plain
from studio_worker.studio.wire import (
    CLOSE_CODES,
    DEAD_PEER_S,
    Accept,
    Capabilities,
    CompleteAck,
    ErrorFrame,
    Fail,
    FailAck,
    Heartbeat,
    HeartbeatAck,
    Hello,
    LogBatch,
    LogEntry,
    Offer,
    Reject,
    RejectCode,
    Welcome,
    read_studio_frame,
)

_DETAIL_CHARS = 500
"""Of what the studio says of an error; it goes into every line about it."""


class State(enum.Enum):
    """Where a session is: nothing may be sent between hello and welcome."""

    FRESH = "fresh"
    AWAITING_WELCOME = "awaiting welcome"
    OPEN = "open"


@dataclass(frozen=True)
class Welcomed:
    worker_id: str


@dataclass(frozen=True)
class Offered:
    """An offer, its claim not yet judged."""

    claim: dict[str, Any]


@dataclass(frozen=True)
class Acknowledged:
    """The studio has noted the end of a job (``completeAck``, ``failAck``)."""

    job_id: str


@dataclass(frozen=True)
class BeatAcknowledged:
    """The studio has read a heartbeat, and everything that was sent before it."""


Event = Welcomed | Offered | Acknowledged | BeatAcknowledged | None


class SessionProtocol:
    """One connection's rules.

    Args:
        now: when the connection was made.
        dead_peer_s: how long the studio may be silent.
    """

    def __init__(self, now: float, dead_peer_s: float = DEAD_PEER_S) -> None:
        self.state = State.FRESH
        self.dead_at = now + dead_peer_s
        """When the connection counts as dead unless a frame of the protocol arrives before."""
        self._dead_peer_s = dead_peer_s
        self._held: set[str] = set()

    def hello(self, auth_token: str, capabilities: Capabilities) -> Hello:
        """The first frame, due at once; nothing else may be sent until ``welcome``."""
        assert self.state is State.FRESH
        self.state = State.AWAITING_WELCOME
        return Hello(auth_token=auth_token, capabilities=capabilities)

    def receive(self, message: str | bytes, now: float) -> Event:
        """What one message from the studio means.

        Raises:
            FrameError: unreadable; to be logged and dropped.
            ProtocolError: the studio said that the session is over; its class says whether for good.
        """
        frame = read_studio_frame(message)
        self.dead_at = now + self._dead_peer_s
        match frame:
            case Welcome():
                if self.state is not State.AWAITING_WELCOME:
                    raise FrameError("a second welcome")
                self.state = State.OPEN
                return Welcomed(frame.worker_id)
            case Offer():
                if self.state is not State.OPEN:
                    raise FrameError("an offer before welcome")
                return Offered(frame.claim)
            case CompleteAck() | FailAck():
                return Acknowledged(frame.job_id)
            case HeartbeatAck():
                return BeatAcknowledged()
            case ErrorFrame():
                raise error_for_code(CLOSE_CODES.get(frame.code, 1000), f"{frame.code}: {frame.message}")

    def heartbeat(self, capabilities: Capabilities, current_job_id: str | None) -> Heartbeat:
        self._assert_open()
        return Heartbeat(capabilities=capabilities, current_job_id=current_job_id)

    def accept(self, job_id: str) -> Accept:
        self._assert_open()
        self._held.add(job_id)
        return Accept(job_id=job_id)

    def reject(self, job_id: str, reason: str, code: RejectCode | None) -> Reject:
        self._assert_open()
        return Reject(job_id=job_id, reason=reason, code=code)

    def fail(self, job_id: str, error: str, *, retryable: bool) -> Fail | None:
        """The report of a failure, or ``None`` where the studio does not hold the job for this connection.

        A dropped connection releases its claims, and a ``fail`` for a job that is not held is a
        protocol violation: the studio has put that job back already.
        """
        self._assert_open()
        if job_id not in self._held:
            return None
        self._held.discard(job_id)
        return Fail(job_id=job_id, error=error, retryable=retryable)

    def delivered(self, job_id: str) -> None:
        """The job's result has reached the studio by upload: it is held no more."""
        self._held.discard(job_id)

    def log_batch(self, entries: tuple[LogEntry, ...]) -> LogBatch:
        self._assert_open()
        return LogBatch(entries=entries)

    def _assert_open(self) -> None:
        assert self.state is State.OPEN, f"nothing may be sent while {self.state.value}"


def error_for_code(close_code: int, detail: str) -> ProtocolError:
    """What a close code means for the worker: the one place that tells passing from final."""
    detail = plain(detail[:_DETAIL_CHARS])
    match close_code:
        case 4001:
            return RefusedByStudio(
                f"the studio does not accept this worker's token ({detail}); approve the worker anew: "
                "studio-worker register --reset, then start the service"
            )
        case 4003:
            return DuplicateWorker(
                f"another process is connected as this worker ({detail}); stop it, or give this machine an "
                "identity of its own: studio-worker register --reset, then start the service"
            )
        case 4004:
            return RefusedByStudio(
                f"this worker was deleted at the studio ({detail}); "
                "to come back: studio-worker register --reset, then start the service"
            )
        case _:
            return ProtocolError(f"the studio ended the session ({detail})")
