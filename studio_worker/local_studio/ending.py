"""When a studio that a command runs is to end: what signals ask of it, and a terminal that was closed.

SIGTERM comes from whatever looks after services: what is asked then may take its time, so that load balancers
hear of it first. SIGINT comes from a person, who does not wait; nor does whoever asks twice.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
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

        def heed(number: int) -> None:
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

        with _heard(heed, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
            yield


@contextmanager
def _heard(heed: Callable[[int], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Have these signals heeded by a thread: a handler runs within whatever the main thread does, may wait
    there for itself, and is not run at all where the signal came just before that thread began to wait.
    """
    heard, hearing = socket.socketpair()
    hearing.setblocking(False)

    def run() -> None:
        while number := heard.recv(1)[0]:
            if number in numbers:
                heed(number)

    thread = threading.Thread(target=run, name="signals", daemon=True)
    thread.start()
    before = {number: signal.signal(number, _leave_it) for number in numbers}
    before_fd = signal.set_wakeup_fd(hearing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        hearing.setblocking(True)
        hearing.send(b"\0")
        thread.join()
        for each in (heard, hearing):
            each.close()


def _leave_it(_number: int, _frame: FrameType | None) -> None:
    """The thread heeds it."""


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
