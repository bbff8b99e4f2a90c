"""How the studio processes of one database wake one another, by PostgreSQL's ``LISTEN`` and ``NOTIFY``.

What is sent are hints: the rows are the truth, and whoever has missed a hint looks at everything once.
A hint is sent after its transaction is committed, and not in it: PostgreSQL lets only one transaction with a
``NOTIFY`` commit at a time, which would hold up every step of every job. That something changed, or that jobs
came, is told a few times a second at most, however many there were.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import sqlalchemy

from studio_worker.local_studio.storage.postgres import engine_of

logger = logging.getLogger(__name__)

CHANNEL = "studio"
CHANGES_S = 0.25
"""So often other processes hear at most that something has changed; pages there are as late."""
QUEUED_S = 0.05
"""The same of jobs that came; idle workers there are as late."""
_RETRY_S = 1.0
_KEPT_HINTS = 1000
_PAYLOAD_CHARS = 1000
"""PostgreSQL takes 7,999 bytes; a model's name that was cut is nobody's, which costs nothing but time."""

Kind = Literal["change", "end", "offer", "offer_others", "queued", "look"]
_SELDOM: dict[Kind, float] = {"change": CHANGES_S, "queued": QUEUED_S}


@dataclass(frozen=True)
class Hint:
    """What to look at. ``look``, which is never sent, means: hints may have been missed, look at everything.

    ``end`` ends what sessions of ``worker_id`` are over by the rows; ``offer`` offers this worker its next
    job, ``offer_others`` everybody but it. ``queued``: a job of this ``model`` came for those who have none.
    """

    kind: Kind
    worker_id: str = ""
    model: str = ""

    def payload(self) -> str:
        """As it is sent."""
        return f"{self.kind}:{self.model or self.worker_id}"[:_PAYLOAD_CHARS]


def read_hint(payload: str) -> Hint:
    """A hint as it came. What a later version says, and this one does not know, is a change all the same."""
    kind, _, about = payload.partition(":")
    known = {name: name for name in get_args(Kind)}
    return Hint("queued", model=about) if kind == "queued" else Hint(known.get(kind, "change"), about)


Hear = Callable[[Hint], None]


class Wake(Protocol):
    """The other processes of this studio."""

    def start(self, hear: Hear) -> None:
        """From now on call ``hear`` with what other processes say, from any thread."""

    def tell(self, hint: Hint) -> None:
        """Say it to all others, soon. From any thread."""

    def stop(self) -> None:
        """Say what is left, and hear no more."""


class Alone:
    """A studio of one process: there is nobody to wake."""

    def start(self, hear: Hear) -> None:
        """Nobody says anything."""

    def tell(self, hint: Hint) -> None:
        """Nobody listens."""

    def stop(self) -> None:
        """Nothing to end."""


class Listening:
    """Hears and tells over one connection of its own, which is made again whenever it breaks.

    Args:
        url: the database, as SQLAlchemy writes it for psycopg.
    """

    def __init__(self, url: sqlalchemy.URL) -> None:
        self._engine = engine_of(url)
        self._errors = (self._engine.dialect.loaded_dbapi.Error, sqlalchemy.exc.SQLAlchemyError, OSError)
        self._hints: deque[Hint] = deque(maxlen=_KEPT_HINTS)
        self._merged: set[Hint] = set()
        self._told_at = dict.fromkeys(_SELDOM, 0.0)
        self._stopping = threading.Event()
        self._nudge, self._nudged = socket.socketpair()
        self._nudge.setblocking(False)
        self._nudged.setblocking(False)
        self._thread: threading.Thread | None = None

    def start(self, hear: Hear) -> None:
        """Listen, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, args=(hear,), name="wake", daemon=True)
        self._thread.start()

    def tell(self, hint: Hint) -> None:
        """Say it soon; hints are kept while there is no connection."""
        if hint.kind in _SELDOM:
            if hint in self._merged:
                return
            self._merged.add(hint)
        else:
            self._hints.append(hint)
        self._wake()

    def stop(self) -> None:
        """Say what is left where there is a connection, and end."""
        self._stopping.set()
        self._wake()
        if self._thread is not None:
            self._thread.join()
        self._engine.dispose()
        self._nudge.close()
        self._nudged.close()

    # --- within -------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is nudged already, many times over, or stopped
            self._nudge.send(b"\0")

    def _run(self, hear: Hear) -> None:
        is_told = False
        while not self._stopping.is_set():
            try:
                connection = self._connect()
            except self._errors as error:
                if not is_told:
                    logger.error("cannot listen to other processes", extra={"error": str(error)})
                is_told = True
                self._stopping.wait(_RETRY_S)
                continue
            is_told = False
            hear(Hint("look"))
            try:
                self._exchange(connection, hear)
            except self._errors as error:
                logger.warning("connection to other processes broke", extra={"error": str(error)})
            finally:
                connection.close()

    def _connect(self) -> Any:
        """psycopg's own connection, which alone can listen."""
        connection = self._engine.raw_connection()
        own: Any = connection.driver_connection
        connection.detach()
        own.autocommit = True
        own.execute(f"LISTEN {CHANNEL}")
        return own

    def _exchange(self, connection: Any, hear: Hear) -> None:
        own_pid = connection.info.backend_pid
        poll = select.poll()  # select() takes no descriptor above 1023
        for each in (connection, self._nudged):
            poll.register(each, select.POLLIN)
        while True:
            is_last = self._stopping.is_set()  # looked at first: what was told before is said
            self._say(connection, all_of_it=is_last)
            if is_last:
                return
            for notice in connection.notifies(timeout=0):
                if notice.pid != own_pid:
                    hear(read_hint(notice.payload))
            due_s = min(map(self._due_in_s, tuple(self._merged)), default=None)
            poll.poll(None if due_s is None else math.ceil(due_s * 1000))
            with contextlib.suppress(BlockingIOError):
                self._nudged.recv(4096)

    def _say(self, connection: Any, *, all_of_it: bool) -> None:
        while self._hints:
            _notify(connection, self._hints[0])
            self._hints.popleft()  # only what was said
        due = [hint for hint in tuple(self._merged) if all_of_it or self._due_in_s(hint) == 0.0]
        for hint in due:
            self._merged.discard(hint)  # first: what comes now is told once more
            self._told_at[hint.kind] = time.monotonic()
            _notify(connection, hint)

    def _due_in_s(self, hint: Hint) -> float:
        return max(0.0, self._told_at[hint.kind] + _SELDOM[hint.kind] - time.monotonic())


def _notify(connection: Any, hint: Hint) -> None:
    connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, hint.payload()))
