"""The signals that steer the service: SIGTERM and SIGINT stop it, SIGHUP has it read its configuration again.

They are blocked in every thread, and one thread takes them with sigwait, so that no handler ever interrupts a
lock, a download or torch half-way. What a signal does is for the service to say.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

STOP = frozenset({signal.SIGTERM, signal.SIGINT})
RELOAD = signal.SIGHUP


def block() -> None:
    """To be called before there is a second thread: threads inherit it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP | {RELOAD})


def stop_comes_within(seconds: float) -> bool:
    """Wait for a stop signal, so long at most; it is taken where it comes."""
    return signal.sigtimedwait(STOP, seconds) is not None


def watch(
    *, reload: Callable[[], None], stop: Callable[[str], float], hand_back: Callable[[str], None]
) -> None:
    """Take signals until the process ends: the work of a thread.

    Args:
        stop: called with the name of the first stop signal; returns how many seconds the job in hand has.
        hand_back: called with the reason when they are over or a second stop signal comes.
    """
    while (number := signal.sigwait(STOP | {RELOAD})) == RELOAD:
        reload()
    limit_s = stop(signal.Signals(number).name)
    hand_back("second signal" if stop_comes_within(limit_s) else "stop limit")
