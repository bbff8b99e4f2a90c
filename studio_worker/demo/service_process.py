"""The real service as a child process: started by the command that systemd uses, its notify socket heard.

For the demo, and for tests that need the whole service with its signals and exit statuses.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from studio_worker.errors import StudioWorkerError

_numbers = itertools.count()


class ServiceProcessError(StudioWorkerError):
    """The child process did not do what was waited for."""


class ServiceProcess:
    """One run of ``studio-worker run``. A context manager: whatever is left of it is killed at the end.

    Args:
        config: the configuration folder.
        log_path: where its stderr goes; appended to.
        environment: added to this process's own.
    """

    def __init__(self, config: Path, log_path: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log_path = log_path
        self.messages: list[str] = []
        """What it has told the notify socket so far, a line each, e.g. ``READY=1``."""
        self._shown = 0
        # An abstract address: no path length limit, nothing to clean up.
        name = f"studio-worker-{os.getpid()}-{next(_numbers)}"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind("\0" + name)
        self._heard = threading.Condition()
        self._listener = threading.Thread(target=self._listen, name="notify-listener", daemon=True)
        self._listener.start()
        with log_path.open("ab") as log_file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "studio_worker", "run", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stderr=log_file,
                env={**os.environ, **(environment or {}), "NOTIFY_SOCKET": f"@{name}"},
                start_new_session=True,  # a ctrl-C here is not the child's
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._notify.shutdown(socket.SHUT_RDWR)  # the listener reads what has come, then the end
        self._listener.join()
        self._notify.close()

    def await_message(
        self, wanted: str, limit_s: float, on_message: Callable[[str], None] | None = None
    ) -> None:
        """Wait until the service has told systemd ``wanted`` (the beginning of a line).

        Args:
            on_message: called here with every line since the last call of this method.

        Raises:
            ServiceProcessError: it ended before, or the limit passed.
        """
        deadline = time.monotonic() + limit_s
        while not any(line.startswith(wanted) for line in self.messages):
            has_ended = self.process.poll() is not None
            with self._heard:
                has_news = self._heard.wait_for(lambda: len(self.messages) > self._shown, 0.2)
            for line in self.messages[self._shown :]:
                self._shown += 1
                if on_message is not None:
                    on_message(line)
            if has_ended and not has_news:
                raise ServiceProcessError(
                    f"the service ended with exit status {self.process.returncode} before {wanted}; "
                    f"{self.last_line()}"
                )
            if time.monotonic() > deadline:
                raise ServiceProcessError(
                    f"the service did not say {wanted} within {limit_s:g} s; {self.last_line()}"
                )

    def _listen(self) -> None:
        """Take in what the service says, always: a sender on a socket that nobody reads is held up."""
        while lines := self._notify.recv(8192).decode().splitlines():
            with self._heard:
                self.messages += lines
                self._heard.notify_all()

    def stop(self, limit_s: float = 60.0) -> int:
        """SIGTERM; returns the exit status. Raises ServiceProcessError where it does not end in time."""
        self.signal(signal.SIGTERM)
        return self.wait(limit_s)

    def signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, limit_s: float = 60.0) -> int:
        """The exit status. Raises ServiceProcessError where it does not end in time."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise ServiceProcessError(
                f"the service did not end within {limit_s:g} s; {self.last_line()}"
            ) from None

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def last_line(self) -> str:
        """Its last log line, for a message."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return f"its last log line: {lines[-1]}" if lines else "it logged nothing"

    def log_lines(self) -> list[dict[str, Any]]:
        """Its log so far, parsed; only for ``[log] format = "json"``."""
        text = self.log_path.read_text()
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
