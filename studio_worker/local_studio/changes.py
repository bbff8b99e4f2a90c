"""One bell for everything that changes: the page's event stream and waiting threads listen to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Changes:
    """A counter that goes up with every change, and two ways to wait for it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._version = 0
        self._listeners: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    @property
    def version(self) -> int:
        """How many changes there were since the start."""
        return self._version

    def bump(self) -> None:
        """Something changed. From any thread."""
        with self._condition:
            self._version += 1
            self._condition.notify_all()
            # Within the lock, so that forget_listeners() means: no call into that loop any more.
            for event, loop in self._listeners.items():
                loop.call_soon_threadsafe(event.set)

    @contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """An event of the running loop that is set at every change."""
        event = asyncio.Event()
        with self._condition:
            self._listeners[event] = asyncio.get_running_loop()
        try:
            yield event
        finally:
            with self._condition:
                self._listeners.pop(event, None)

    def forget_listeners(self) -> None:
        """The loop is about to close; nobody in it may be called any more."""
        with self._condition:
            self._listeners.clear()

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> None:
        """Block this thread until the predicate holds, looking again at every change.

        Raises:
            TimeoutError: it did not hold within ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self._version
            # Outside the condition's lock: the predicate reads the database, whose writers come here.
            if predicate():
                return
            with self._condition:
                while self._version == seen:
                    remaining_s = deadline - time.monotonic()
                    if remaining_s <= 0:
                        raise TimeoutError(f"nothing brought it about within {timeout_s} s")
                    self._condition.wait(remaining_s)
