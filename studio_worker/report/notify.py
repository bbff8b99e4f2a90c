"""What the service tells systemd (sd_notify(3)). Says nothing where nobody listens."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import sdnotify

from studio_worker.plain import plain

EXTEND_S = 90
"""How much longer a start may take after each sign of progress, in seconds."""

_WAIT_S = 5.0
"""A manager that does not read (a hung PID 1, a supervisor that is none) must not stop the service too."""


class Notifier:
    """Messages to the service manager; safe to call from any thread (each is one datagram).

    Args:
        on_status: gets every status line too, whether or not anybody else listens.
        on_hang: gets what hangs, or "", each time that the watchdog looks.
    """

    def __init__(
        self,
        on_status: Callable[[str], None] = lambda _: None,
        on_hang: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._on_status = on_status
        self._on_hang = on_hang
        self._systemd = sdnotify.SystemdNotifier()
        self._guard = threading.Lock()
        self._is_stopping = False

    def ready(self, status: str) -> None:
        self._send("READY=1", self._status(status))

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; dropped where the manager has not read the ones before.

        Once the service is stopping, its line says that and nothing else.
        """
        if not self._is_stopping:
            self._send(self._status(text), wait_s=0.0)

    def extend_timeout(self, within_s: float = 0.0) -> None:
        """Ask for more time to start; to be sent only while bytes advance, or before a wait that ends."""
        self._send(f"EXTEND_TIMEOUT_USEC={round((EXTEND_S + within_s) * 1_000_000)}")

    def reloading(self) -> None:
        """The configuration is being read again; :meth:`ready` ends it. Only after the first READY."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def watchdog(self, hangs: str = "") -> None:
        """The sign of life, unless something ``hangs``."""
        self._on_hang(hangs)
        if not hangs:
            self._send("WATCHDOG=1")

    def stopping(self, status: str = "stopping", *, within_s: float = 0.0) -> None:
        """The service is on its way out.

        Args:
            within_s: how long that may take; asked for where it is longer than the unit's TimeoutStopSec.
        """
        self._is_stopping = True
        extend = [f"EXTEND_TIMEOUT_USEC={round(within_s * 1_000_000)}"] if within_s else []
        self._send("STOPPING=1", self._status(status), *extend)

    def _status(self, text: str) -> str:
        line = plain(" ".join(text.splitlines()))  # a line end inside a name would begin a new assignment
        self._on_status(line)
        return f"STATUS={line}"

    def _send(self, *lines: str, wait_s: float = _WAIT_S) -> None:
        # sdnotify encodes as Latin-1 and drops, without a word, the whole message that does not fit, READY
        # included; systemd reads UTF-8. Handing it each UTF-8 byte as one character gives systemd its own.
        text = "\n".join(lines).encode(errors="replace").decode("latin-1")
        with self._guard:
            if self._systemd.socket is not None:
                self._systemd.socket.settimeout(wait_s)
            self._systemd.notify(text)


class ReadyLine:
    """The status line of a service that is ready: its state, then what the operator has to know besides.

    Safe to use from any thread.
    """

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self.is_paused = False
        self._state = ""
        self._notes: dict[str, str] = {}
        self._lock = threading.Lock()

    def say(self, state: str | None = None) -> None:
        """The line is what it was again, or with ``state`` from now."""
        with self._lock:
            self._state = state or self._state
            self._notifier.status(self._text())

    def note(self, topic: str, text: str) -> None:
        """Add, or replace, what is to be known of ``topic``; empty = nothing any more."""
        with self._lock:
            if text != self._notes.get(topic, ""):
                self._notes[topic] = text
                self._notifier.status(self._text())

    def __str__(self) -> str:
        with self._lock:
            return self._text()

    def _text(self) -> str:
        paused = "paused" if self.is_paused else ""
        head = ", ".join(part for part in ("ready", self._state, paused) if part)
        return "; ".join([head, *(text for text in self._notes.values() if text)])


def watchdog_interval_s() -> float | None:
    """How often WATCHDOG=1 is due (half of ``WATCHDOG_USEC``), or ``None`` without a watchdog."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2 / 1_000_000
