"""What the service tells systemd (sd_notify(3)). Says nothing where nobody listens."""

from __future__ import annotations

import os

import sdnotify

EXTEND_S = 90
"""How much longer a start may take after each sign of progress, in seconds."""


class Notifier:
    """Messages to the service manager; safe to call from any thread (each is one datagram)."""

    def __init__(self) -> None:
        self._systemd = sdnotify.SystemdNotifier()

    def ready(self, status: str) -> None:
        self._systemd.notify(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._systemd.notify(f"STATUS={text}")

    def extend_timeout(self) -> None:
        """Ask for more time to start; to be sent only while bytes advance."""
        self._systemd.notify(f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1_000_000}")

    def watchdog(self) -> None:
        self._systemd.notify("WATCHDOG=1")

    def stopping(self, status: str = "stopping") -> None:
        self._systemd.notify(f"STOPPING=1\nSTATUS={status}")


def watchdog_interval_s() -> float | None:
    """How often WATCHDOG=1 is due (half of ``WATCHDOG_USEC``), or ``None`` without a watchdog."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2 / 1_000_000
