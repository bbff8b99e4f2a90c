"""Who is connected to this process, and what that changes elsewhere: its sessions come and go by their rows.

A session's row is :mod:`presence`'s. What the other processes should look at at once they are told by
:mod:`wake`; what they tell is looked at here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import suppress

from sqlalchemy import Connection

from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.leases import OFFER_LOST, WORKER_LEFT, Loss, Replaced
from studio_worker.local_studio.pictures import CannotStore
from studio_worker.local_studio.presence import Presence, Said
from studio_worker.local_studio.rules import QueuedJob
from studio_worker.local_studio.session import DOUBT_S, EndSession, WorkerSession
from studio_worker.local_studio.wake import Hint, Wake
from studio_worker.studio import wire

logger = logging.getLogger(__name__)

_WHY: dict[wire.ErrorCode, str] = {
    "duplicate_worker": "another session of this worker began",
    "auth_failed": "this worker was registered again",
    "worker_deleted": "this worker was deleted from the studio",
}


_ASKED = 2
"""So many idle workers of the process to which a job came are asked, first those that made its model last,
and of the others where there is none of these: each may have its reasons not to be the one, and whoever is
given a job has the next one asked.
"""


class Attendance:
    """The sessions of this process, by their workers. Belongs to the server's event loop; any thread may call
    :meth:`end` and :meth:`hear`.
    """

    def __init__(self, queue: JobQueue, presence: Presence, wake: Wake) -> None:
        self._queue = queue
        self._presence = presence
        self._wake = wake
        self._loop: asyncio.AbstractEventLoop | None = None
        self.live: dict[str, WorkerSession] = {}
        self.is_leaving = False
        """Whether nobody is to be sent here any more; who is here is served."""
        self.is_stopping = False

    # --- what the rest of the studio wants ----------------------------------------------------------

    def offer_soon(self, worker_id: str) -> None:
        """Its job is done: offer the next one by itself. Only from the server's event loop."""
        if worker_id in self.live:
            self._heed(Hint("offer", worker_id))
        else:
            self._wake.tell(Hint("offer", worker_id))

    def offer_idle(self, model: str) -> None:
        """A job came: a worker that has none, with whatever process, is offered it now. From any thread."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._come, model)
                return
        except RuntimeError:  # closed, and all sessions with it
            logger.debug("a job came while the sessions ended")
        self._wake.tell(Hint("queued", model=model))

    def _come(self, model: str) -> None:
        # Where one here has the model loaded it gets the job, and looks of all others would be in vain.
        if not self._offer_idle(_ASKED, model):
            self._wake.tell(Hint("queued", model=model))

    def offered(self, session: WorkerSession, job: QueuedJob) -> None:
        """This worker was given a job; there may be one for another, too. Only from the event loop."""
        session.inherited, session.told, session.model = None, job.job_id, job.model
        session.current_job_id = job.job_id
        self._offer_idle(1)

    def end(self, worker_id: str, code: wire.ErrorCode) -> None:
        """End this worker's session, if it has one with any process. From any thread."""
        self._presence.dismiss(worker_id, code)
        self.hear(Hint("end", worker_id))
        self._wake.tell(Hint("end", worker_id))

    def hear(self, hint: Hint) -> None:
        """Something of these sessions is to be looked at. From any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # closed, and all sessions with it
                self._loop.call_soon_threadsafe(self._heed, hint)

    def offer_others(self, worker_id: str) -> None:
        """All idle workers but this one are offered a job, with whatever process they are."""
        self._heed(Hint("offer_others", worker_id))
        self._wake.tell(Hint("offer_others", worker_id))

    def _heed(self, hint: Hint) -> None:
        mine = self.live.get(hint.worker_id)
        if hint.kind == "look":
            for session in self.live.values():
                self._end_if_replaced(session)
        elif hint.kind == "offer_others":
            for session in self.live.values():
                if session is not mine and session.current_job_id is None:
                    session.commands.put_nowait("offer")
        elif hint.kind == "end" and mine is not None:
            self._end_if_replaced(mine)
        elif hint.kind == "offer" and mine is not None:
            mine.current_job_id = None
            mine.commands.put_nowait("offer")
        elif hint.kind == "queued":
            self._offer_idle(_ASKED, hint.model)

    def _offer_idle(self, most: int, model: str = "") -> bool:
        """Have some idle workers asked; whether one of them made this model last."""
        idle = [each for each in self.live.values() if each.state == "idle" and each.commands.empty()]
        random.shuffle(idle)
        idle.sort(key=lambda session: session.model != model)
        for session in idle[:most]:
            session.commands.put_nowait("offer")
        return any(session.model == model for session in idle[:most])

    def _end_if_replaced(self, session: WorkerSession) -> None:
        try:
            self._presence.check(session.worker_id, session.number)
        except Replaced as over:
            session.commands.put_nowait(ended(over))
        except CannotStore as error:  # its next heartbeat will tell
            cannot_store(session, error)

    # --- one session --------------------------------------------------------------------------------

    def has(self, session: WorkerSession) -> bool:
        """Whether it is its worker's latest here."""
        return self.live.get(session.worker_id) is session

    def enter(self, session: WorkerSession, capabilities: wire.Capabilities) -> None:
        """It has said hello: whatever session its worker had before, with whatever process, is over."""
        self._loop = asyncio.get_running_loop()
        entered = self._presence.enter(session.worker_id, capabilities)
        session.number, session.inherited = entered.number, entered.inherited
        older = self.live.get(session.worker_id)
        self.live[session.worker_id] = session
        if older is not None:
            older.commands.put_nowait(ended(Replaced("duplicate_worker")))
        if entered.was_elsewhere:
            self._wake.tell(Hint("end", session.worker_id))

    def heard(self, session: WorkerSession, heartbeat: wire.Heartbeat) -> None:
        """A heartbeat renews the lease, and says whether the job of the last session is still in hand.

        Raises:
            Replaced: the session is not its worker's any more.
        """
        said = Said(heartbeat.capabilities, heartbeat.current_job_id)
        before, session.noted = session.noted, None
        session.current_job_id = said.current_job_id
        try:
            self._presence.renew(session.worker_id, session.number, said, before)
            session.noted = said
            inherited = session.inherited
            if inherited is not None and inherited.job_id != heartbeat.current_job_id:
                # It has forgotten the job, or has failed, which it says when the job is offered again.
                self._release(session, inherited.job_id, inherited.loss)
                session.inherited = None
            if heartbeat.current_job_id is None and time.monotonic() < session.in_doubt_until:
                self._release_unknown(session)
        except CannotStore as error:  # the worker is here all the same
            cannot_store(session, error)

    def _release_unknown(self, session: WorkerSession) -> None:
        """What it holds by the rows and does not know of, since the database did not answer in time."""
        held = self._queue.held_by(session.worker_id)
        session.in_doubt_until = min(session.in_doubt_until, time.monotonic() + DOUBT_S)
        if held is not None and held.job_id != session.told:
            self._release(session, held.job_id, OFFER_LOST)

    def leave(self, session: WorkerSession) -> None:
        """It is over, for whatever reason; where the process stops, its claims wait for the worker."""
        if not self.has(session):
            return
        worker_id, number = session.worker_id, session.number
        try:
            if self.is_stopping:
                self._presence.hand_over(worker_id, number)
            else:
                # In this order: whoever sees the worker offline finds its job released already.
                held = self._queue.held_by(worker_id)
                if held is not None:
                    self._release(session, held.job_id, WORKER_LEFT)
                self._presence.leave(worker_id, number)
        except CannotStore as error:  # the claim stays until its lease runs out, or the worker is back
            cannot_store(session, error)
        finally:
            del self.live[worker_id]

    def _release(self, session: WorkerSession, job_id: str, loss: Loss) -> None:
        """Let go of what this session holds: what the worker's next one has taken over is that one's."""

        def judge(_connection: Connection, job: QueuedJob) -> Loss | None:
            is_its_own = (job.worker_id, job.session_no) == (session.worker_id, session.number)
            return loss if is_its_own else None

        self._queue.let_go(job_id, judge)


def ended(over: Replaced) -> EndSession:
    """What the worker is told."""
    return EndSession(over.code, _WHY.get(over.code, "the studio has ended the session"))


def cannot_store(session: WorkerSession, error: Exception) -> None:
    """Say so in the log."""
    logger.error("nothing can be stored", extra={"worker_id": session.worker_id, "error": str(error)})
