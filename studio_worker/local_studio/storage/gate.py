"""No asking in vain: while a database server does not answer, its clients are told so at once.

Sessions ask the database on the event loop. Were each of them to wait for the same server, heartbeats would
be acknowledged too late, and workers would leave. So whoever waited in vain shuts the gate for all, and one
thread asks until the server answers: at once, where only this one step had too much to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from studio_worker.local_studio.pictures import StorageAway

logger = logging.getLogger(__name__)

ASKED_EVERY_S = 1.0


class Gate:
    """Open, until somebody shuts it. All methods may be called from any thread.

    Args:
        ask: asks the server, past the gate; raises SQLAlchemyError while it does not answer.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._changing = threading.Lock()
        self._asking: threading.Thread | None = None
        self._is_shut = False
        self._ending = threading.Event()

    def require_open(self) -> None:
        """Raises StorageAway where it is shut."""
        if self._is_shut:
            raise StorageAway("the database did not answer a moment ago")

    def shut(self, why: object) -> None:
        """Nobody asks any more until the server answers."""
        with self._changing:
            if self._is_shut or self._ending.is_set():
                return
            self._is_shut = True
            logger.error("the database does not answer", extra={"error": str(why)})
            asking = threading.Thread(target=self._open_again, name="gate", daemon=True)
            try:
                asking.start()
            except RuntimeError:  # no thread is to be had: who asks in vain next tries again
                self._is_shut = False
            else:
                self._asking = asking

    def end(self) -> None:
        """Ask no more."""
        with self._changing:
            self._ending.set()
        if self._asking is not None:
            self._asking.join()

    def _open_again(self) -> None:
        began = time.monotonic()
        try:
            while not self._answers():
                if self._ending.wait(ASKED_EVERY_S):
                    return
            away_s = round(time.monotonic() - began, 1)
            logger.info("the database answers again", extra={"away_s": away_s})
        finally:  # of a fault in here, too: who asks next tells
            self._is_shut = False

    def _answers(self) -> bool:
        try:
            self._ask()
        except SQLAlchemyError:
            return False
        return True
