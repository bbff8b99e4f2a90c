"""One connection's conversation: what is answered to what the studio says, without a socket or a clock.

Joins the rules of the session (``protocol.py``), the judging of offers (``offers.py``) and the desk. Frames
leave through ``send``; whoever holds the socket (``session.py``) carries them, in that order.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable

from studio_worker.errors import FrameError, StudioWorkerError
from studio_worker.models import NAME_CHARS
from studio_worker.studio.session.offers import (
    AlreadyOurs,
    Ignore,
    Impossible,
    Judgement,
    OnItsWay,
    Refuse,
    Situation,
    Take,
    judge,
)
from studio_worker.studio.session.protocol import BeatAcknowledged, Offered, SessionProtocol, State, Welcomed
from studio_worker.studio.session.shipping import Shipping
from studio_worker.studio.wire import Body, Capabilities
from studio_worker.work.desk import Desk

log = logging.getLogger(__name__)

_DROPPED_KINDS = 20
"""So many kinds of unreadable frames and offers are told of one connection."""

_MAX_WAITING = 20
"""Offers that wait to be judged. The protocol has one in flight; more come from a studio gone wrong."""


def _at_once(work: Callable[[], Judgement], then: Callable[[Judgement], None]) -> None:
    then(work())


class Exchange:
    """What one connection says. Everything is called from the session's thread.

    Args:
        protocol: fresh, of this connection alone.
        send: takes a frame that is to go out.
        situation: what the worker knows of itself, asked anew for each offer.
        capabilities: asked anew for each heartbeat.
        uploading: the job whose upload is under way, if any.
        shipping: what the log has for the studio.
        on_redelivery: called with the job that the studio offers while its result waits in the outbox.
        on_answer: called with the judgement of every offer and the model it names, once it is answered.
        aside: does the first, which may wait for a disk, and calls the second with what it gave, in the
            session's thread.
    """

    def __init__(
        self,
        protocol: SessionProtocol,
        send: Callable[[Body], None],
        *,
        desk: Desk,
        situation: Callable[[], Situation],
        capabilities: Callable[[], Capabilities],
        uploading: Callable[[], str | None],
        shipping: Shipping,
        on_redelivery: Callable[[str], None],
        on_answer: Callable[[Judgement, str], None],
        aside: Callable[[Callable[[], Judgement], Callable[[Judgement], None]], None] = _at_once,
    ) -> None:
        self.protocol = protocol
        self._send = send
        self._desk = desk
        self._situation = situation
        self._capabilities = capabilities
        self._uploading = uploading
        self._shipping = shipping
        self._on_redelivery = on_redelivery
        self._on_answer = on_answer
        self._aside = aside
        self._waiting: deque[Offered] = deque()
        self._is_judging = self._has_ended = False
        self._postponed: dict[str, Offered] = {}
        self._dropped: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether the studio has said welcome: only then may anything be sent."""
        return self.protocol.state is State.OPEN

    def begin(self, auth_token: str) -> None:
        """Say hello."""
        self._send(self.protocol.hello(auth_token, self._capabilities()))

    def receive(self, message: str | bytes, now: float) -> bool:
        """Take one message in and answer it; returns whether it was the studio's welcome.

        Raises:
            ProtocolError: the studio said that the session is over; its class says whether for good.
        """
        try:
            event = self.protocol.receive(message, now)
        except FrameError as error:
            self._note_dropped("frame dropped", str(error))
            return False
        if isinstance(event, Offered):
            self._answer(event)
        elif isinstance(event, BeatAcknowledged):
            self._shipping.beat_acknowledged()
        elif isinstance(event, Welcomed):
            log.info("session open", extra={"op": "session", "worker_id": event.worker_id})
            self.beat()
            return True
        return False

    def beat(self) -> None:
        """A heartbeat, once the session is open. It names the job in hand, or else the one being uploaded."""
        if self.is_open:
            current = self._desk.current_job_id or self._uploading()
            self._send(self.protocol.heartbeat(self._capabilities(), current))
            self._shipping.beat()

    def ship(self) -> None:
        """What the log has for the studio, once the session is open."""
        if self.is_open and (entries := self._shipping.next_batch()):
            self._send(self.protocol.log_batch(entries))

    def end(self) -> None:
        """The connection is over."""
        self._has_ended = True
        self._shipping.end()

    def fail(self, job_id: str, error: str, *, retryable: bool) -> bool:
        """Report a failure; ``False`` where the studio does not hold the job for this connection."""
        frame = self.protocol.fail(job_id, error, retryable=retryable) if self.is_open else None
        if frame is not None:
            self._postponed.pop(job_id, None)  # an offer of what we held is answered with this
            self._send(frame)
        return frame is not None

    def settle(self, job_id: str) -> bool:
        """The upload during which ``job_id`` was offered has ended: answer that offer, if there is one."""
        offer = self._postponed.pop(job_id, None)
        if offer is not None:
            self._answer(offer)
        return offer is not None

    def _note_dropped(self, message: str, error: str) -> None:
        """Each kind once: a studio of a later version may send what is not known here at every heartbeat."""
        if error not in self._dropped and len(self._dropped) < _DROPPED_KINDS:
            self._dropped.add(error)
            log.warning(message, extra={"op": "session", "error": error})

    def _answer(self, offer: Offered) -> None:
        """Have it judged, after those before it: whether a job can be taken depends on them."""
        if len(self._waiting) >= _MAX_WAITING:
            self._note_dropped("offer dropped", f"{_MAX_WAITING} others wait to be answered")
            return
        self._waiting.append(offer)
        self._judge_next()

    def _judge_next(self) -> None:
        if self._is_judging or not self._waiting:
            return
        self._is_judging = True
        offer = self._waiting.popleft()

        def judged(judgement: Judgement) -> None:
            self._is_judging = False
            if not self._has_ended:  # else the studio has put the job back
                self._tell(offer, judgement)
                self._judge_next()

        self._aside(lambda: self._judge(offer), judged)

    def _tell(self, offer: Offered, judgement: Judgement) -> None:
        match judgement:
            case OnItsWay(job_id):
                self._postponed[job_id] = offer
                self._on_redelivery(job_id)
                # It may have ended meanwhile, and perhaps before it knew of this offer.
                if self._uploading() != job_id:
                    self.settle(job_id)
            case Take(job):
                self._send(self.protocol.accept(job.job_id))
                self._desk.put(job)
                log.info("job accepted", extra=_facts(job.job_id, model=job.model))
            case AlreadyOurs(job_id):
                self._send(self.protocol.accept(job_id))
                log.info("job offered again", extra=_facts(job_id))
                if job_id != self._desk.current_job_id:  # it is made at this moment; its picture comes later
                    self._on_redelivery(job_id)
            case Refuse(job_id, reason, code):
                self._send(self.protocol.reject(job_id, reason, code))
                log.info("job rejected", extra=_facts(job_id, reason=reason, code=code))
            case Impossible(job_id, error):
                self._send(self.protocol.accept(job_id))
                self.fail(job_id, error, retryable=False)
                log.error("job failed", extra=_facts(job_id, outcome="failed", error=error, retryable=False))
            case Ignore(reason):
                self._note_dropped("offer dropped", reason)
        self._on_answer(judgement, str(offer.claim.get("model", ""))[:NAME_CHARS])

    def _judge(self, offer: Offered) -> Judgement:
        job_id = str(offer.claim.get("jobId", ""))
        try:
            return judge(offer.claim, self._situation())
        except (StudioWorkerError, OSError) as error:  # a disk that cannot be asked
            return Refuse(job_id, f"the worker cannot tell: {error}")
        except Exception as error:
            # A fault of ours, met in an odd claim or an odd file: no job may end the session for all others.
            # By its frames, without its text, which may quote the prompt.
            log.error(
                "offer cannot be judged",
                extra=_facts(
                    job_id,
                    error=type(error).__name__,
                    traceback="".join(traceback.format_tb(error.__traceback__)),
                ),
            )
            return Refuse(job_id, f"the worker cannot tell: {type(error).__name__}")


def _facts(job_id: str, **more: object) -> dict[str, object]:
    return {"op": "job", "job_id": job_id[:NAME_CHARS], **{k: v for k, v in more.items() if v is not None}}
