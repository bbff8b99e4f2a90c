"""Work that may wait for a disk, done beside the session's loop, one piece after another.

A disk that hangs holds up what asks it, and no heartbeat.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Aside:
    """A thread of its own, from the first piece of work on. It does not keep the process from ending.

    Args:
        back: takes what is to be done, with its argument, back to the thread that gave the work.
    """

    def __init__(self, back: Callable[[Callable[[Any], None], Any], object]) -> None:
        self._back = back
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do ``work``, which must not raise, and have ``then`` called with what it gives."""
        self._work.put((work, then))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="offers", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """There will be no more."""
        self._work.put(None)

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            work, then = given
            self._back(then, work())
