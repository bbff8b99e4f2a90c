"""What the worker and its studio say to each other, whichever connection carries it.

The shell around the rules: what they decide (``exchange.py``) is carried out here, and what the worker and
the courier have to tell is put to them. That comes from any thread, and is done in the one of the session's
loop. Opens no connection and closes none (``connector.py``); a dropped one does not touch the job in hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

from studio_worker.context import called, carried
from studio_worker.errors import StudioWorkerError
from studio_worker.models import NAME_CHARS
from studio_worker.spool.failures import Failures
from studio_worker.studio.http.uploads import Uploads
from studio_worker.studio.session.aside import Aside
from studio_worker.studio.session.exchange import (
    Act,
    Answered,
    AwaitUpload,
    Exchange,
    Hand,
    Judge,
    Opened,
    Redeliver,
    Send,
)
from studio_worker.studio.session.offers import AlreadyOurs, Judgement, Refuse, judge
from studio_worker.studio.session.ports import Box, SessionReports
from studio_worker.studio.session.protocol import Offered
from studio_worker.studio.wire import Body
from studio_worker.wording import frames
from studio_worker.work.desk import Desk

log = logging.getLogger(__name__)


class StudioSession:
    """The session with one studio: tells it what there is to tell, and does what its answers ask for."""

    def __init__(
        self, box: Box, desk: Desk, uploads: Uploads, failures: Failures, reports: SessionReports
    ) -> None:
        self._box = box
        self._desk = desk
        self._uploads = uploads
        self._failures = failures
        self._reports = reports
        self._aside = Aside(self._call)
        self._exchange: Exchange | None = None
        self._send: Callable[[Body], None] = _to_nobody
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- called from other threads ---

    def report_failure(self, job_id: str, error: str, *, retryable: bool) -> None:
        """A job cannot be done here: say so, if the studio still holds it for this connection."""
        if not self._call(self._fail, job_id, error, retryable):
            self._failures.add(job_id, error, retryable=retryable)

    def delivered(self, job_id: str) -> None:
        """The job's result has been uploaded."""
        self._call(self._deliver, job_id)

    def beat_now(self) -> None:
        """Send a heartbeat at once, if there is an open session: what the studio should know has changed."""
        self._call(self.beat)

    def lost(self, job_id: str, error: str) -> None:
        """A finished picture is gone that the studio may wait for: report it, or answer its offer anew."""
        if not self._call(self._lose, job_id, error):
            self._failures.add(job_id, error, retryable=True)

    def settled(self, job_id: str) -> None:
        """An upload has ended, during which its job was offered again."""
        self._call(self._settle, job_id)

    def _call(self, what: Callable[..., None], *args: object) -> bool:
        """Do it in the loop's thread; ``False`` where there is no loop, or no more."""
        loop = self._loop
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(what, *args)
        except RuntimeError:  # closed
            return False
        return True

    # --- called in the loop's thread, by whoever holds the connection ---

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """For so long the running loop is the one that carries the session."""
        self._loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            self._loop = None
            self._aside.close()

    def begin(self, exchange: Exchange, send: Callable[[Body], None], auth_token: str) -> None:
        """A connection is made: say hello over it."""
        self._exchange, self._send = exchange, send
        self._do(exchange.begin(auth_token, self._box.capabilities()))

    def receive(self, message: str | bytes, now: float) -> None:
        """The studio has said something.

        Raises:
            ProtocolError: that the session is over; its class says whether for good.
        """
        if self._exchange is not None:
            self._do(self._exchange.receive(message, now))

    def beat(self) -> None:
        """A heartbeat, once the session is open. It names the job in hand, or else the one being uploaded."""
        if self._exchange is not None and self._exchange.is_open:
            current = self._desk.current_job_id or self._uploads.under_way
            self._do(self._exchange.beat(self._box.capabilities(), current))

    def ship(self) -> None:
        """What the log has for the studio, once the session is open."""
        if self._exchange is not None:
            self._do(self._exchange.ship())

    def end(self) -> None:
        """The connection is gone: nothing more can be said over it."""
        exchange, self._exchange, self._send = self._exchange, None, _to_nobody
        if exchange is not None:
            exchange.end()

    def went_down(self, why: str) -> None:
        """There is no connection, and there will be another try."""
        self._reports.reconnecting(why)

    # --- what the rules decide ---

    def _do(self, acts: Iterable[Act]) -> None:
        for act in acts:
            match act:
                case Send(frame):
                    self._send(frame)
                case Judge(offer):
                    # Beside the loop: a disk that hangs holds up the answer, and no heartbeat.
                    with _called(offer):
                        work, then = partial(self._judge, offer), partial(self._judged, self._exchange, offer)
                        self._aside.do(carried(work), carried(then))
                case Hand(job):
                    if not self._desk.put(job):  # another lane was given it between judging and now
                        self._fail(job.job_id, "another lane of this worker has the job", True)
                case Redeliver(job_id):
                    if job_id != self._desk.current_job_id:  # else it is made now; its picture comes later
                        self._uploads.offered_again(job_id)
                case AwaitUpload(job_id):
                    self._uploads.offered_again(job_id)
                    # It may have ended meanwhile, and perhaps before it knew of this offer.
                    if not self._uploads.is_under_way(job_id):
                        self._settle(job_id)
                case Answered(judgement, model):
                    self._reports.offer_answered(judgement, model)
                case Opened():
                    self.beat()
                    self._reports.connected()
                    self._uploads.hurry()

    def _judged(self, exchange: Exchange | None, offer: Offered, judgement: Judgement) -> None:
        if exchange is not None:
            self._do(exchange.judged(offer, judgement))

    def _judge(self, offer: Offered) -> Judgement:
        job_id = str(offer.claim.get("jobId", ""))
        try:
            judgement = judge(offer.claim, self._box.situation())
            if isinstance(judgement, AlreadyOurs):
                self._uploads.take_over(judgement.job_id)  # where another lane was to deliver it
            return judgement
        except (StudioWorkerError, OSError) as error:  # a disk that cannot be asked
            return Refuse(job_id, f"the worker cannot tell: {error}")
        except Exception as error:
            # A fault of ours, met in an odd claim or an odd file: no job may end the session for all others.
            # By its frames, without its text, which may quote the prompt.
            log.error(
                "offer cannot be judged",
                extra={
                    "op": "job",
                    "error": type(error).__name__,
                    "traceback": frames(error),
                },
            )
            return Refuse(job_id, f"the worker cannot tell: {type(error).__name__}")

    # --- what other threads tell ---

    def _fail(self, job_id: str, error: str, retryable: bool) -> None:
        acts = [] if self._exchange is None else self._exchange.fail(job_id, error, retryable=retryable)
        self._do(acts)
        if not acts:
            with called(job_id=job_id):
                log.info("failure not reported: the studio has put the job back", extra={"op": "job"})
                self._failures.add(job_id, error, retryable=retryable)

    def _lose(self, job_id: str, error: str) -> None:
        if job_id == self._desk.current_job_id:
            return  # it is being made anew already
        if self._exchange is not None and self._exchange.has_postponed(job_id):
            self._settle(job_id)
        else:
            self._fail(job_id, error, True)

    def _settle(self, job_id: str) -> None:
        if self._exchange is not None:
            self._do(self._exchange.settle(job_id))

    def _deliver(self, job_id: str) -> None:
        if self._exchange is not None:
            self._exchange.protocol.delivered(job_id)


def _called(offer: Offered) -> AbstractContextManager[None]:
    """What an offer's job is called: only the studio's word, so no longer than names may be."""
    said = (offer.claim.get("jobId"), offer.claim.get("model"))
    job_id, model = (each[:NAME_CHARS] if isinstance(each, str) else "" for each in said)
    return called(job_id=job_id, model=model)


def _to_nobody(frame: Body) -> None:
    """No connection stands."""
