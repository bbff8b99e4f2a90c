"""What feeds systemd's watchdog: signs of life of all that must not hang. Where no systemd watches, as in a
container, ``status`` says what hangs, and whoever probes it ends the service.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from studio_worker.report.notify import Notifier, watchdog_interval_s

log = logging.getLogger(__name__)

UNWATCHED_S = 30.0
"""How often it is looked where systemd names no interval: as with the unit's WatchdogSec=60."""


def start_watchdog(
    notifier: Notifier,
    troubles: Mapping[str, Callable[[], bool]],
    ended: threading.Event,
    about_job: Callable[[], AbstractContextManager[None]],
) -> None:
    """Feed systemd's watchdog, where there is one, and tell what hangs, from a thread of its own.

    Args:
        troubles: what must not be the case, as the log says it; WATCHDOG=1 is withheld meanwhile.
        ended: ends the thread.
        about_job: what is logged meanwhile is about the job in hand.
    """
    interval_s = watchdog_interval_s() or UNWATCHED_S

    def feed() -> None:
        while not ended.wait(interval_s):
            message = next((message for message, is_so in troubles.items() if is_so()), None)
            notifier.watchdog(message or "")
            if message is not None:
                with about_job():
                    log.error(message, extra={"op": "watchdog"})

    threading.Thread(target=feed, name="watchdog", daemon=True).start()
