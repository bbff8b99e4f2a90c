"""How one run of the service ends, and the exit status that tells systemd why.

It is told to stop, or something is gone for good: the session, the courier, the GPU. What has to end with it
asks to be told; nothing here knows what that is.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable

from studio_worker.errors import StudioWorkerError
from studio_worker.files import DISK_TROUBLES

log = logging.getLogger(__name__)

_MAY_PASS = DISK_TROUBLES | {errno.EACCES, errno.EPERM}


class Ending:
    """The end of one run. Safe from any thread."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        """The service was told to stop, or is about to end: nothing new begins."""
        self.over = threading.Event()
        """The last job is done and the session closed."""
        self.error: StudioWorkerError | None = None
        """What is gone for good."""
        self._on_end: list[Callable[[StudioWorkerError | None], None]] = []
        self._on_hand_back: list[Callable[[str], None]] = []

    @property
    def is_near(self) -> bool:
        return self.stop.is_set() or self.error is not None

    def on_end(self, end: Callable[[StudioWorkerError | None], None]) -> None:
        """Have ``end`` called when the run is to end, with what is gone for good where that is why."""
        self._on_end.append(end)

    def on_hand_back(self, hand_back: Callable[[str], None]) -> None:
        """Have ``hand_back`` called, with the reason, when the job in hand is not to be waited for."""
        self._on_hand_back.append(hand_back)

    def ask(self) -> None:
        """End after the job in hand."""
        self.stop.set()
        for end in self._on_end:
            end(None)

    def hand_back(self, reason: str) -> None:
        """Wait for the job in hand no longer."""
        for hand_back in self._on_hand_back:
            hand_back(reason)

    def end_with(self, error: StudioWorkerError) -> None:
        """End now: the job in hand cannot be delivered to anybody, or be made."""
        self.error = error
        for end in self._on_end:
            end(error)
        self.hand_back(str(error))


def exit_status(work: Callable[[], None]) -> int:
    """Do ``work``; returns the exit status, after a log line that says what it ended with."""
    try:
        work()
    except StudioWorkerError as error:
        return _ended_with(str(error), error.exit_status)
    except OSError as error:
        # The state folder's disk, most likely. Not the job's: those never come this far.
        status = os.EX_TEMPFAIL if error.errno in _MAY_PASS else os.EX_IOERR
        return _ended_with(f"{error.filename or 'the disk'}: {error.strerror}", status)
    except Exception:  # a fault of ours: in the journal as every other line, by its priority and redacted
        log.critical("service crashed", exc_info=True, extra={"op": "service", "exit_status": 1})
        return 1
    log.info("service stopped", extra={"op": "service", "exit_status": 0})
    return 0


def _ended_with(error: str, status: int) -> int:
    log.critical("service ends with an error", extra={"op": "service", "error": error, "exit_status": status})
    return status


def log_crash(crash: threading.ExceptHookArgs) -> None:
    """For :data:`threading.excepthook`: a crash of a thread is a line like all others."""
    log.critical(
        "thread crashed",
        exc_info=(crash.exc_type, crash.exc_value or crash.exc_type(), crash.exc_traceback),
        extra={"op": "service", "in_thread": crash.thread.name if crash.thread else ""},
    )
