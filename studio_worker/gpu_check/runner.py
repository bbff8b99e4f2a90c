"""Leads the check: rows to processes that look at them, time limits, and what becomes of each.

Imports no torch: a GPU that hangs must not hang this. A process that hangs, crashes or has lost its device is
ended, and the next row gets another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from studio_worker.gpu_check.rows import Found, Row

START_LIMIT_S = 150.0
"""Importing torch from a cold, slow disk takes a minute."""

_LEAST_S = 5.0
"""With less time than this left no row is begun."""

_DUMP_S = 1.0
"""How long a process that hangs has for saying where."""

_END_S = 5.0
"""How long one has for its end: with CUDA it takes a second or two."""

_TRACE_LINES = 15


class Child:
    """One process for rows. Started when it is first needed.

    Args:
        command: that starts it.
        log: where its complaints go.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = command
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def look(self, row: Row, deadline: float) -> Found:
        """What becomes of ``row``; after its limit, or at ``deadline`` (:func:`time.monotonic`), it has
        failed.
        """
        found, began = Found(row.name), time.monotonic()
        heard_from, is_started = self._heard_bytes(), False
        until = min(began + START_LIMIT_S, deadline)
        try:
            process = self._process or self._start(until)
            is_started, heard_from, began = True, self._heard_bytes(), time.monotonic()
            until = min(began + row.limit_s, deadline)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: the next message says so
                print(json.dumps({"work": row.work, "given": row.given}), file=process.stdin, flush=True)
            answer = self._await(until, found)
            found.state, found.error, found.trace = answer["state"], answer["error"], answer["trace"]
            if not answer["is_usable"]:
                self.end()
        except TimeoutError:
            what = "no end" if is_started else "its process did not start"
            found.state, found.error = "failed", f"{what} within {until - began:.0f} s"
            self._ask_where()
            self.end()
            found.trace = self._last_words(heard_from)
        except EOFError:
            found.state, found.error = "failed", f"its process ended: {self.end()}"
            found.trace = self._last_words(heard_from)
        except OSError as error:  # no process, no descriptor, no room for the log
            found.state, found.error = "failed", f"its process cannot be started: {error.strerror}"
            self.end()
        found.seconds = round(time.monotonic() - began, 2)
        return found

    def _start(self, until: float) -> subprocess.Popen[str]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # so that what it has started ends with it
            )
        self._process, self._messages = process, queue.Queue()
        threading.Thread(target=self._listen, args=(process, self._messages), daemon=True).start()
        self._await(until, Found(""), "ready")
        return process

    @staticmethod
    def _listen(process: subprocess.Popen[str], messages: queue.Queue[dict[str, Any] | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            messages.put(json.loads(line))
        messages.put(None)

    def _await(self, until: float, found: Found, wanted: str = "found") -> Any:
        """What it says of ``wanted``; figures that come before are put into ``found``.

        Raises:
            TimeoutError: it says nothing for too long.
            EOFError: it has ended.
        """
        while True:
            try:
                message = self._messages.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if message is None:
                raise EOFError
            if wanted in message:
                return message[wanted]
            name, value = message["figure"]
            found.figures[name] = value

    def _ask_where(self) -> None:
        """Have it write where it hangs to its log (faulthandler)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_DUMP_S)

    def _heard_bytes(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:  # it is the first, and has not started
            return 0

    def _last_words(self, since: int) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(since)
                lines = log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:  # the check is over, and its files are removed
            return ""
        return "\n".join(lines[-_TRACE_LINES:])

    def end(self) -> str:
        """End it and all that it has started; says how it ended, where it had by itself."""
        process, self._process = self._process, None
        if process is None:
            return ""
        assert process.stdin is not None
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            process.stdin.close()  # one that waits for rows ends by itself
            process.wait(_END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)  # not for ever: one that hangs in the driver ends when the driver lets it
        return how(process.returncode)


def how(returncode: int | None) -> str:
    """How a process ended, in words."""
    if returncode is None:
        return "it hangs in the driver"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-returncode).name
    return f"exit status {returncode}"


class Runner:
    """Looks at rows.

    Args:
        alone, beside: what starts a process for rows that are looked at one by one, and for those that may
            run beside others.
        folder: for the processes' complaints.
        together: how many processes there may be beside each other.
        on_found: called with what became of each row, from several threads, one at a time.
    """

    def __init__(
        self,
        alone: Sequence[str],
        beside: Sequence[str],
        folder: Path,
        *,
        together: int,
        on_found: Callable[[Found], None],
    ) -> None:
        self._first = Child(alone, folder / "alone.log")
        self._crew = [Child(beside, folder / f"beside-{index}.log") for index in range(together)]
        self._on_found = on_found
        self._lock = threading.Lock()
        self._is_over = False

    def run(self, rows: Iterable[Row], *, deadline: float) -> None:
        """Look at all ``rows``; those that are left at ``deadline`` (:func:`time.monotonic`) are left out."""
        for is_together, group in groupby(rows, key=lambda row: row.together):
            waiting = deque(group)
            if not is_together:
                self._work(self._first, waiting, deadline)
                continue
            self._first.end()  # what it keeps on the device is not for rows of this kind
            threads = [
                threading.Thread(target=self._work, args=(child, waiting, deadline)) for child in self._crew
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for child in self._crew:
                child.end()

    def _work(self, child: Child, waiting: deque[Row], deadline: float) -> None:
        while not self._is_over:
            try:
                row = waiting.popleft()
            except IndexError:
                return
            left_s = deadline - time.monotonic()
            if left_s < _LEAST_S:
                found = Found(row.name, "left out", error="no time was left")
            else:
                found = child.look(row, deadline)
                if found.state == "failed" and time.monotonic() >= deadline:
                    found.state, found.error = "left out", "the time was over while it was looked at"
            with self._lock:
                if not self._is_over:
                    self._on_found(found)

    def end(self) -> None:
        """End every process, whatever it does."""
        self._is_over = True
        for child in (self._first, *self._crew):
            child.end()


def command_for(device: str, folder: Path, *, small: bool, threads: int = 0) -> list[str]:
    """What starts a process for rows."""
    words = [sys.executable, "-m", "studio_worker.gpu_check.child", device, str(folder)]
    return [*words, *(["--small"] if small else []), *(["--threads", str(threads)] if threads else [])]
