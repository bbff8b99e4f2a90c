"""Who is here, as rows: studio processes, and the workers' sessions with any of them. Rules are leases.py's.

Times are the database's own, for several machines need not agree on theirs: each beat measures how far the
database's clock is from this machine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, or_, select, update

from studio_worker.local_studio import leases
from studio_worker.local_studio.job_rows import is_held
from studio_worker.local_studio.leases import DEAD_S, LEASE_S, Loss, Session
from studio_worker.local_studio.rules import JobStatus, QueuedJob
from studio_worker.local_studio.storage.database import SERVER_TIME, Database, insert_new, upsert
from studio_worker.local_studio.storage.tables import jobs, processes, sessions
from studio_worker.local_studio.workers import note_seen
from studio_worker.studio import wire

# Made once: to make a statement costs more than to run it.
_OF = select(sessions).where(sessions.c.worker_id == bindparam("who"))
_LOCKED = _OF.with_for_update()
_CHANGE = update(sessions).where(sessions.c.worker_id == bindparam("who"))
_CHANGE_PRESENT = _CHANGE.where(sessions.c.number == bindparam("present"))
_IS_FRESH = processes.c.beat_at >= bindparam("since")
_LIVING = select(processes.c.process_id).where(_IS_FRESH)
_DEAD = select(processes.c.process_id).where(processes.c.beat_at < bindparam("since"))
_CONNECTED = (
    select(sessions)
    .join_from(sessions, processes, sessions.c.process_id == processes.c.process_id, isouter=True)
    .where(
        or_(sessions.c.process_id == bindparam("here"), _IS_FRESH),
        sessions.c.lease_until >= bindparam("now"),  # an end may not have been written down
    )
)
_TAKE_OVER = (
    update(jobs)
    .where(jobs.c.worker_id == bindparam("who"), is_held(jobs))
    .values(session_no=bindparam("its_number"))
    .returning(jobs.c.job_id, jobs.c.status)
)
_LOST = (
    select(jobs.c.job_id)
    .join_from(jobs, sessions, jobs.c.worker_id == sessions.c.worker_id, isouter=True)
    .where(
        is_held(jobs),
        or_(
            sessions.c.worker_id.is_(None),
            sessions.c.lease_until < bindparam("now"),
            sessions.c.number > jobs.c.session_no,
        ),
    )
)

_NOBODY = {"number": 0, "lease_until": 0.0, "is_paused": False, "heartbeat_at": 0.0}


@dataclass(frozen=True)
class Seat:
    """A connected worker, as its last heartbeat said."""

    is_paused: bool
    current_job_id: str | None
    heartbeat_at: float


@dataclass(frozen=True)
class Said:
    """What a worker says of itself with each heartbeat."""

    capabilities: wire.Capabilities
    current_job_id: str | None = None


@dataclass(frozen=True)
class Inherited:
    """A job that the worker had in its last session; ``loss``: what becomes of it if the worker forgot it."""

    job_id: str
    loss: Loss


@dataclass(frozen=True)
class Entered:
    """A session that has begun. ``was_elsewhere``: another process may still have the one before it."""

    number: int
    inherited: Inherited | None
    was_elsewhere: bool


class Presence:
    """The rows of processes and sessions.

    Args:
        process_id: this process's.
        clock: this machine's, in Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        process_id: str,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.process_id = process_id
        self._database = database
        self._lease_s = lease_s
        self._clock = clock
        self._offset_s = 0.0

    # --- processes ----------------------------------------------------------------------------------

    def beat(self, address: str) -> None:
        """This process lives, and listens there; those that are long dead are forgotten."""
        with self._database.writing() as connection:
            if connection.dialect.name == "postgresql":
                now = connection.execute(SERVER_TIME).scalar_one()
                self._offset_s = float(now) - self._clock()
            here = {"process_id": self.process_id, "address": address, "beat_at": self._now()}
            upsert(connection, processes, {**here, "started_at": self._now()}, keep=("started_at",))
            dead = connection.execute(_DEAD, {"since": self._since()}).scalars().all()
        if dead:
            # In a step of its own, that waits for nobody: of two that have been away for long each would have
            # its own row, and wait for the other's.
            with self._database.writing() as connection:
                locked = connection.execute(_DEAD.with_for_update(skip_locked=True), {"since": self._since()})
                gone = locked.scalars().all()
                connection.execute(delete(processes).where(processes.c.process_id.in_(gone)))

    def end_process(self) -> None:
        """This process is stopped, and its workers are to come back to another."""
        with self._database.writing() as connection:
            connection.execute(delete(processes).where(processes.c.process_id == self.process_id))

    def has_others(self) -> bool:
        """Whether other processes of this studio live."""
        with self._database.reading() as connection:
            return len(self._living(connection)) > 1

    # --- sessions -----------------------------------------------------------------------------------

    def enter(self, worker_id: str, capabilities: wire.Capabilities) -> Entered:
        """A worker has said hello to this process; the claims of its last session are this one's."""
        with self._database.writing() as connection:
            # A row to lock, so that of two that begin at once one is the second.
            insert_new(connection, sessions, {"worker_id": worker_id, **_NOBODY})
            row = connection.execute(_LOCKED, {"who": worker_id}).one()
            before = _session(row)
            after = leases.begun(before, self.process_id, self._now(), self._lease_s)
            self._save(connection, worker_id, after, _told(Said(capabilities), self._now()))
            note_seen(connection, worker_id, capabilities, self._now())
            job = connection.execute(_TAKE_OVER, {"who": worker_id, "its_number": after.number}).first()
            inherited = None
            if job is not None:
                is_accepted, living = job.status == JobStatus.RUNNING, self._living(connection)
                loss = leases.loss_on_return(before, living, is_accepted=is_accepted)
                inherited = Inherited(job.job_id, loss)
        return Entered(after.number, inherited, before.process_id not in {None, self.process_id})

    def renew(self, worker_id: str, number: int, said: Said, before: Said | None) -> None:
        """A heartbeat came. Most say what the last one said, and nobody else hears of those.

        Args:
            before: what the database knows already.

        Raises:
            Replaced: the session is over, or the worker's next one has begun.
        """
        now = self._now()
        values = {"lease_until": now + self._lease_s, **_told(said, now)}
        asked = {"who": worker_id, "present": number, **values}
        if before is not None and said.capabilities == before.capabilities:
            if not self._database.change(_CHANGE_PRESENT, asked, is_news=said != before):
                self.check(worker_id, number)
            return
        with self._database.writing() as connection:
            if connection.execute(_CHANGE_PRESENT, asked).rowcount == 0:
                leases.renewed(_session_of(connection, worker_id), number, now)
            note_seen(connection, worker_id, said.capabilities, now)

    def check(self, worker_id: str, number: int) -> None:
        """Raises Replaced where this session is not the worker's any more."""
        with self._database.reading() as connection:
            leases.renewed(_session_of(connection, worker_id), number, self._now())

    def hand_over(self, worker_id: str, number: int) -> None:
        """The session ends because this process does; its claims wait for the worker."""
        with self._database.writing() as connection:
            session = _session_of(connection, worker_id, is_to_change=True)
            if session is not None and session.number == number:
                self._save(connection, worker_id, leases.handed_over(session, self._now(), self._lease_s))

    def leave(self, worker_id: str, number: int) -> None:
        """The session is over, and its claims were released."""
        with self._database.writing() as connection:
            connection.execute(_CHANGE_PRESENT, {"who": worker_id, "present": number, "process_id": None})

    def dismiss(self, worker_id: str, code: wire.ErrorCode) -> None:
        """The studio ends this worker's session, whichever process has it."""
        with self._database.writing() as connection:
            session = _session_of(connection, worker_id, is_to_change=True)
            if session is not None:
                self._save(connection, worker_id, leases.dismissed(session, code))

    def connected(self) -> dict[str, Seat]:
        """All workers that have a session with a living process, by their ids."""
        with self._database.reading() as connection:
            rows = self._connected(connection)
        return {row.worker_id: Seat(row.is_paused, row.current_job_id, row.heartbeat_at) for row in rows}

    def ready(self, connection: Connection) -> list[str]:
        """Of those the ones that could take a job, as part of a step."""
        return [row.worker_id for row in self._connected(connection) if not row.is_paused]

    # --- claims -------------------------------------------------------------------------------------

    def lost(self) -> list[str]:
        """The ids of all jobs whose lease has run out, or that no session has."""
        with self._database.reading() as connection:
            return list(connection.execute(_LOST, {"now": self._now()}).scalars())

    def loss(self, connection: Connection, job: QueuedJob) -> Loss | None:
        """Whether this job, locked by the transaction under way, is lost by now."""
        session = _session_of(connection, job.worker_id or "")
        return leases.loss_by(job.session_no, session, self._living(connection), self._now())

    # --- within -------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock() + self._offset_s

    def _since(self) -> float:
        """Whoever has not beaten since then is dead."""
        return self._now() - DEAD_S

    def _connected(self, connection: Connection) -> Sequence[Row[Any]]:
        asked = {"here": self.process_id, "since": self._since(), "now": self._now()}
        return connection.execute(_CONNECTED, asked).all()

    def _living(self, connection: Connection) -> set[str]:
        # This process lives, whether or not it could say so lately.
        others = connection.execute(_LIVING, {"since": self._since()}).scalars()
        return {self.process_id, *others}

    def _save(
        self, connection: Connection, worker_id: str, session: Session, said: dict[str, Any] | None = None
    ) -> None:
        values = {
            "number": session.number,
            "process_id": session.process_id,
            "lease_until": session.lease_until,
            "end_code": session.end_code,
            **(said or {}),
        }
        connection.execute(_CHANGE, {"who": worker_id, **values})


def _session_of(connection: Connection, worker_id: str, *, is_to_change: bool = False) -> Session | None:
    row = connection.execute(_LOCKED if is_to_change else _OF, {"who": worker_id}).one_or_none()
    return None if row is None else _session(row)


def _session(row: Row[Any]) -> Session:
    return Session(row.number, row.process_id, row.lease_until, row.end_code)


def _told(said: Said, now: float) -> dict[str, Any]:
    is_paused = not said.capabilities.auto_enabled
    return {"is_paused": is_paused, "current_job_id": said.current_job_id, "heartbeat_at": now}
