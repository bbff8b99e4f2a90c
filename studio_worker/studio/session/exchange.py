"""One connection's conversation: what follows from what the studio says, without a socket, a clock or a desk.

Joins the rules of the session (``protocol.py``), the answers to offers and what is shipped of the log. Acts
come out; whoever holds the rest (``session.py``) carries them out, in that order and before it calls again.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from studio_worker.errors import FrameError
from studio_worker.jobs import Job
from studio_worker.models import NAME_CHARS
from studio_worker.studio.session.offers import (
    AlreadyOurs,
    Ignore,
    Impossible,
    Judgement,
    OnItsWay,
    Refuse,
    Take,
)
from studio_worker.studio.session.protocol import (
    Acknowledged,
    BeatAcknowledged,
    Offered,
    SessionProtocol,
    State,
    Welcomed,
)
from studio_worker.studio.session.shipping import Shipping
from studio_worker.studio.wire import Body, Capabilities

log = logging.getLogger(__name__)

_DROPPED_KINDS = 20
"""So many kinds of unreadable frames and offers are told of one connection."""

_MAX_WAITING = 20
"""Offers that wait to be judged. The protocol has one in flight; more come from a studio gone wrong."""


@dataclass(frozen=True)
class Opened:
    """The studio has said welcome: a heartbeat is due, and from now on everything else may be sent."""


@dataclass(frozen=True)
class Send:
    frame: Body


@dataclass(frozen=True)
class Judge:
    """Have this offer judged, and give the judgement to :meth:`Exchange.judged`."""

    offer: Offered


@dataclass(frozen=True)
class Hand:
    """Hand this job, which is accepted, to the worker."""

    job: Job


@dataclass(frozen=True)
class Redeliver:
    """The studio offers a job whose result waits in the outbox: have it delivered now."""

    job_id: str


@dataclass(frozen=True)
class AwaitUpload:
    """The studio offers the very job that is being uploaded: :meth:`Exchange.settle` it when that ends."""

    job_id: str


@dataclass(frozen=True)
class Answered:
    """An offer of a job for ``model`` has its answer; note it."""

    judgement: Judgement
    model: str


Act = Opened | Send | Judge | Hand | Redeliver | AwaitUpload | Answered


class Exchange:
    """What is said over one connection, and what else is to be done for that."""

    def __init__(self, protocol: SessionProtocol, shipping: Shipping) -> None:
        self.protocol = protocol
        self._shipping = shipping
        self._waiting: deque[Offered] = deque()
        self._is_judging = self._has_ended = False
        self._postponed: dict[str, Offered] = {}
        self._dropped: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether the studio has said welcome: only then may anything be sent."""
        return self.protocol.state is State.OPEN

    def begin(self, auth_token: str, capabilities: Capabilities) -> list[Act]:
        """Say hello."""
        return [Send(self.protocol.hello(auth_token, capabilities))]

    def receive(self, message: str | bytes, now: float) -> list[Act]:
        """Take one message in.

        Raises:
            ProtocolError: the studio said that the session is over; its class says whether for good.
        """
        try:
            event = self.protocol.receive(message, now)
        except FrameError as error:
            self._note_dropped("frame dropped", str(error))
            return []
        match event:
            case Welcomed(worker_id):
                log.info("session open", extra={"op": "session", "worker_id": worker_id})
                return [Opened()]
            case Offered():
                return self._answer(event)
            case BeatAcknowledged():
                self._shipping.beat_acknowledged()
            case Acknowledged() | None:
                pass
        return []

    def judged(self, offer: Offered, judgement: Judgement) -> list[Act]:
        """Answer ``offer``, then have the next one judged, which depends on that."""
        self._is_judging = False
        if self._has_ended:  # the studio has put the job back
            return []
        model = str(offer.claim.get("model", ""))[:NAME_CHARS]
        return [*self._tell(offer, judgement), Answered(judgement, model), *self._judge_next()]

    def beat(self, capabilities: Capabilities, current_job_id: str | None) -> list[Act]:
        """A heartbeat. Asserts that the session is open."""
        frame = self.protocol.heartbeat(capabilities, current_job_id)
        self._shipping.beat()
        return [Send(frame)]

    def ship(self) -> list[Act]:
        """What the log has for the studio, once the session is open."""
        if self.is_open and (entries := self._shipping.next_batch()):
            return [Send(self.protocol.log_batch(entries))]
        return []

    def end(self) -> None:
        """The connection is over."""
        self._has_ended = True
        self._shipping.end()

    def fail(self, job_id: str, error: str, *, retryable: bool) -> list[Act]:
        """Report a failure; nothing where the studio does not hold the job for this connection."""
        frame = self.protocol.fail(job_id, error, retryable=retryable) if self.is_open else None
        if frame is None:
            return []
        self._postponed.pop(job_id, None)  # an offer of what we held is answered with this
        return [Send(frame)]

    def has_postponed(self, job_id: str) -> bool:
        """Whether an offer of ``job_id`` waits for the end of its upload."""
        return job_id in self._postponed

    def settle(self, job_id: str) -> list[Act]:
        """The upload during which ``job_id`` was offered has ended: answer that offer, if there is one."""
        offer = self._postponed.pop(job_id, None)
        return [] if offer is None else self._answer(offer)

    def _note_dropped(self, message: str, error: str) -> None:
        """Each kind once: a studio of a later version may send what is not known here at every heartbeat."""
        if error not in self._dropped and len(self._dropped) < _DROPPED_KINDS:
            self._dropped.add(error)
            log.warning(message, extra={"op": "session", "error": error})

    def _answer(self, offer: Offered) -> list[Act]:
        """Have it judged, after those before it: whether a job can be taken depends on them."""
        if len(self._waiting) >= _MAX_WAITING:
            self._note_dropped("offer dropped", f"{_MAX_WAITING} others wait to be answered")
            return []
        self._waiting.append(offer)
        return self._judge_next()

    def _judge_next(self) -> list[Act]:
        if self._is_judging or not self._waiting:
            return []
        self._is_judging = True
        return [Judge(self._waiting.popleft())]

    def _tell(self, offer: Offered, judgement: Judgement) -> list[Act]:
        match judgement:
            case OnItsWay(job_id):
                self._postponed[job_id] = offer
                return [AwaitUpload(job_id)]
            case Take(job):
                log.info("job accepted", extra={"op": "job"})
                return [Send(self.protocol.accept(job.job_id)), Hand(job)]
            case AlreadyOurs(job_id):
                log.info("job offered again", extra={"op": "job"})
                return [Send(self.protocol.accept(job_id)), Redeliver(job_id)]
            case Refuse(job_id, reason, code):
                facts = {"op": "job", "reason": reason} | ({"code": code} if code else {})
                log.info("job rejected", extra=facts)
                return [Send(self.protocol.reject(job_id, reason, code))]
            case Impossible(job_id, error):
                log.error(
                    "job failed", extra={"op": "job", "outcome": "failed", "error": error, "retryable": False}
                )
                return [Send(self.protocol.accept(job_id)), *self.fail(job_id, error, retryable=False)]
            case Ignore(reason):
                self._note_dropped("offer dropped", reason)
        return []
