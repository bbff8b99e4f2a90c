"""When a studio that a command runs is to end: what signals ask of it, and a terminal that was closed.

SIGTERM comes from whatever looks after services: what is asked then may take its time, so that load balancers
hear of it first. SIGINT comes from a person, who does not wait; nor does whoever asks twice.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class Ending:
    """Whether the end was ``asked`` for, and whether it is to come ``now``. For any thread."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.now = threading.Event()

    def ask(self) -> None:
        """Soon; whoever asks again means now."""
        if self.asked.is_set():
            self.now.set()
        self.asked.set()

    def end(self) -> None:
        """Now."""
        self.now.set()
        self.asked.set()

    @contextmanager
    def heeding_signals(self, renew: Callable[[], None] | None) -> Iterator[None]:
        """SIGTERM asks, SIGINT ends. SIGHUP renews, where there is anything to renew; without that it ends
        what lost its terminal. Only from the main thread.
        """
        had_terminal = _has_terminal()

        def heed(number: int, _frame: FrameType | None) -> None:
            if number == signal.SIGTERM:
                self.ask()
            elif number == signal.SIGINT:
                self.end()
            elif renew is not None:
                renew()
            elif had_terminal and not _has_terminal():  # it was closed, with what was started in it
                self.end()
            else:
                logger.info("SIGHUP without effect: there is no certificate to read")

        heeded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, heed) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
