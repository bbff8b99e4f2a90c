"""What feeds systemd's watchdog: signs of life of all that must not hang."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from studio_worker.report.notify import Notifier, watchdog_interval_s

log = logging.getLogger(__name__)


def start_watchdog(
    notifier: Notifier,
    troubles: Mapping[str, Callable[[], bool]],
    ended: threading.Event,
    about_job: Callable[[], AbstractContextManager[None]],
) -> None:
    """Feed systemd's watchdog, where there is one, from a thread of its own.

    Args:
        troubles: what must not be the case, as the log says it; WATCHDOG=1 is withheld meanwhile.
        ended: ends the thread.
        about_job: what is logged meanwhile is about the job in hand.
    """
    if (interval_s := watchdog_interval_s()) is None:
        return

    def feed() -> None:
        while not ended.wait(interval_s):
            message = next((message for message, is_so in troubles.items() if is_so()), None)
            if message is None:
                notifier.watchdog()
            else:
                with about_job():
                    log.error(message, extra={"op": "watchdog"})

    threading.Thread(target=feed, name="watchdog", daemon=True).start()
