"""Turns at the device: lanes ask for them, and one thread, the main one, gives them, one after the other.

Whose turn it is where several wait, order.py says.

That thread runs what needs the device and nothing else. A turn that waits is given up with its job; one that
has begun is stopped by whatever it was handed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from studio_worker.context import carried
from studio_worker.errors import DeviceError
from studio_worker.report.snapshot import TurnFacts
from studio_worker.work.order import Waiting, next_of

Got = TypeVar("Got")


class _Turn(NamedTuple):
    asked: Waiting
    future: Future[Any]
    work: Callable[[], Any]


class Turns:
    """The queue before the device. Safe from any thread.

    Args:
        loaded: the models that are on the device.
    """

    def __init__(self, loaded: Callable[[], Collection[str]] = frozenset) -> None:
        self._loaded = loaded
        self._changed = threading.Condition()
        self._waiting: list[_Turn] = []
        self._is_closed = self._is_serving = False
        self._last_model: str | None = None
        self.facts = TurnFacts()

    def ask(self, work: Callable[[], Got], model: str | None = None) -> Future[Got]:
        """Have ``work``, a picture of ``model`` where it is one, done at the device, under the names of this
        moment, when its turn comes.

        What it gives or raises is the future's. Cancelled, it is not begun; nor is what is asked for after
        :meth:`close`.
        """
        turn: Future[Got] = Future()
        with self._changed:
            if self._is_closed:
                turn.cancel()
            else:
                self._waiting.append(_Turn(Waiting(model, time.monotonic()), turn, carried(work)))
                self._changed.notify()
        return turn

    def is_free(self) -> bool:
        """Whether nobody has the device, or waits for it."""
        return not self._is_serving and not self._waiting

    def serve(self) -> None:
        """Give turns until :meth:`close`.

        Raises:
            DeviceError: a turn ended with it, and was told so: the device is lost for all.
        """
        while (found := self._next()) is not None:
            _, turn, work = found
            if turn.set_running_or_notify_cancel():
                _take(turn, work)
            del found, turn, work  # they hold what was made, or the frames of what failed

    def close(self) -> None:
        """There are no more turns; what waits for one is cancelled."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        for turn in waiting:
            turn.future.cancel()

    def _next(self) -> _Turn | None:
        with self._changed:
            self._is_serving = False
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            self._waiting = [turn for turn in self._waiting if not turn.future.cancelled()] or self._waiting
            if not self._waiting:
                return None
            loaded = self._loaded()
            place = next_of([turn.asked for turn in self._waiting], loaded, time.monotonic())
            self._count(place, loaded)
            self._is_serving = True
            return self._waiting.pop(place)

    def _count(self, place: int, loaded: Collection[str]) -> None:
        model, oldest = self._waiting[place].asked.model, self._waiting[0].asked.model
        if model is None:
            return
        is_other = self._last_model not in {None, model}
        self._last_model = model
        self.facts = TurnFacts(
            switches=self.facts.switches + is_other,
            switches_saved=self.facts.switches_saved + (place > 0 and model in loaded and oldest is not None),
        )


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
