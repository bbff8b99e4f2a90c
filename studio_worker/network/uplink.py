"""The way out of this box, which all its uploads share: one of them at a time, in the order of their coming.

Side by side over a thin link each of several uploads takes as long as all of them together; in a row the
first is through early and the last no later. What is small (calls without a picture, frames of a session)
asks nobody. Knows nothing of sockets: it is told when all of an upload was taken for sending.

Downloads of models give way to uploads: each byte that comes is acknowledged upwards, which on a line of 100
Mbit/s down and 5 up takes a good part of the 5. They rest by the clock and not by a rate, which nobody knows
here: on a fast link an upload is over before it is noticed, and where one follows the other without a break
a quarter of the time is left to them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

LONGEST_S = 15.0
"""So long one upload holds the others back: as long as one piece of it may take. One that is merely slow goes
on beside the next."""
ROUND_S = 4.0
REST_S = 3.0
"""So long of each round downloads rest while an upload is under way: less than a connection may be silent for
(``stall_timeout_s``, 15 s where nobody says otherwise)."""


class Turn:
    """One upload's. ``waited_s``: for those before it."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.until: float | None = None
        """When it holds the others back no more; ``None`` until it has come."""


class Uplink:
    """The order of uploads. Safe from any thread.

    Args:
        clock: seconds that do not jump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self.line: deque[Turn] = deque()
        """Who has the uplink, and who waits for it."""

    @contextlib.contextmanager
    def turn(self) -> Iterator[Turn]:
        """This upload's turn, waited for; it ends with the block, or before with :meth:`sent`."""
        mine, came_at = Turn(), self._clock()
        with self._changed:
            self.line.append(mine)
        try:
            with self._changed:
                left_s = self._tend()
                while mine.until is None:
                    self._changed.wait(left_s)
                    left_s = self._tend()
            mine.waited_s = self._clock() - came_at
            yield mine
        finally:
            self.sent(mine)

    def sent(self, turn: Turn) -> None:
        """All of it was taken for sending: the next may begin, while the last of it and the answer travel."""
        with self._changed, contextlib.suppress(ValueError):  # it was said before, or is passed over
            self.line.remove(turn)
            self._changed.notify_all()

    @property
    def is_taken(self) -> bool:
        """Whether an upload is under way that others wait for, or would."""
        with self._changed:
            return self._tend() > 0.0

    def give_way(self) -> None:
        """Wait while an upload is under way, until the end of this round's rest at most; for downloads."""
        with self._changed:
            while (left_s := min(self._tend(), REST_S - self._clock() % ROUND_S)) > 0.0:
                self._changed.wait(left_s)

    def _tend(self) -> float:
        """Pass over who has had it for too long. Returns for how many seconds the first has it still."""
        while self.line:
            first, now = self.line[0], self._clock()
            if first.until is None:
                first.until = now + LONGEST_S
            if (left_s := first.until - now) > 0.0:
                return left_s
            self.line.popleft()
            self._changed.notify_all()
        return 0.0
