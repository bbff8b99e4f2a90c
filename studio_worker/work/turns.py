"""Turns at the device: lanes ask for them, and one thread, the main one, gives them, one after the other.

That thread runs what needs the device and nothing else. A turn that waits is given up with its job; one that
has begun is stopped by whatever it was handed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from studio_worker.context import carried
from studio_worker.errors import DeviceError

Got = TypeVar("Got")


class Turns:
    """The queue before the device. Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._is_closed = False

    def ask(self, work: Callable[[], Got]) -> Future[Got]:
        """Have ``work`` done at the device, under the names of this moment, when its turn comes.

        What it gives or raises is the future's. Cancelled, it is not begun; nor is what is asked for after
        :meth:`close`.
        """
        turn: Future[Got] = Future()
        with self._changed:
            if self._is_closed:
                turn.cancel()
            else:
                self._waiting.append((turn, carried(work)))
                self._changed.notify()
        return turn

    def serve(self) -> None:
        """Give turns until :meth:`close`.

        Raises:
            DeviceError: a turn ended with it, and was told so: the device is lost for all.
        """
        while (found := self._next()) is not None:
            turn, work = found
            if turn.set_running_or_notify_cancel():
                _take(turn, work)
            del found, turn, work  # they hold what was made, or the frames of what failed

    def close(self) -> None:
        """There are no more turns; what waits for one is cancelled."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify()
        for turn, _ in waiting:
            turn.cancel()

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            return self._waiting.popleft() if self._waiting else None


def _take(turn: Future[Any], work: Callable[[], Any]) -> None:
    try:
        got = work()
    except BaseException as error:  # it is the lane's to judge, whatever it is
        turn.set_exception(error)
        # Or they, the error and this frame keep each other, and the picture's tensors with them.
        del turn, work
        if isinstance(error, DeviceError):
            raise
    else:
        turn.set_result(got)
