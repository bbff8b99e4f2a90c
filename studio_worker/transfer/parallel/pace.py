"""How many connections a download uses: one, and more as long as more of them bring more.

Pure: is told the time and what has come, says a number. Measured: where the server does not cap a
connection, one is the fastest; where it does, the more the better, up to what the line or the hashing takes.
"""

from __future__ import annotations

from typing import NamedTuple

_STEP = 8
_GAIN = 1.25
"""A step that brought less than so many times the rate before is taken back."""
_WINDOW_S = 0.1
_WINDOW_BYTES = 1024 * 1024
"""For each connection, before a window shorter than a second says anything."""
_LONG_WINDOW_S = 1.0
_SETTLE_S = 3.0
"""So long are new connections waited for before they count as they are."""
_REST_S = 20.0
"""Between a step that brought nothing, or a refusal, and the next one."""
_BUSY_SHARE = 0.6
"""Above so much of a core, receiving and hashing are what limits; more connections would not help."""
_LATE_SHARE = 0.5
"""Where so many reads find more than they take, this machine is what limits, however little it gives us."""


class Work(NamedTuple):
    """What receiving took so far: CPU seconds, reads, and reads that found more than they took."""

    busy_s: float
    reads: int
    late_reads: int


class Pace:
    """The number of connections, from what the last number brought.

    Args:
        limit: bytes per second that may come at all.
    """

    def __init__(self, *, limit: float | None = None) -> None:
        self.target = 1
        self._is_single = False
        self._most = 1
        self._limit = limit
        self._changed_at: float | None = None
        self._window: tuple[float, int, Work] | None = None
        self._before: tuple[int, float] | None = None
        """Number and rate before the step that is being tried."""
        self._rests_until = 0.0

    def allow(self, now: float, most: int) -> None:
        """Never more than ``most`` from now on."""
        self._most = 1 if self._is_single else most
        if self.target > self._most:
            self._before = None
            self._set(now, self._most)

    def note(self, now: float, received: int, delivering: int, work: Work) -> None:
        """Tell what has come, bytes in all, how many connections deliver, and what it took."""
        if self._changed_at is None:
            self._changed_at = now
        if self._window is None:
            if delivering and (delivering >= self.target or now - self._changed_at > _SETTLE_S):
                self._window = (now, received, work)
            return
        since, before, work_before = self._window
        span = now - since
        enough = received - before >= _WINDOW_BYTES * delivering and span >= _WINDOW_S
        if not enough and span < _LONG_WINDOW_S:
            return
        self._window = (now, received, work)
        is_late = work.late_reads - work_before.late_reads > _LATE_SHARE * (work.reads - work_before.reads)
        is_busy = work.busy_s - work_before.busy_s > _BUSY_SHARE * span
        self._judge(now, (received - before) / span, is_limiting=is_late or is_busy)

    def interrupted(self) -> None:
        """What comes now says nothing of the server: begin to measure anew."""
        self._window = None

    def refused(self, now: float, delivering: int, rest_s: float | None = None) -> None:
        """The server wants fewer connections: go back to those that deliver, and stay there for a while."""
        self._before = None
        self._rests_until = max(self._rests_until, now + max(rest_s or 0.0, _REST_S))
        self._set(now, max(1, min(self.target, delivering)))

    def hold_at_one(self) -> None:
        """The server knows no ranges: one connection, for good."""
        self._is_single = True
        self._most = self.target = 1

    def _judge(self, now: float, rate: float, *, is_limiting: bool) -> None:
        if self._before is not None:
            number, earlier = self._before
            self._before = None
            if rate < earlier * _GAIN:
                self._rests_until = now + _REST_S
                self._set(now, number)
                return
        is_at_limit = self._limit is not None and rate > 0.8 * self._limit
        if now < self._rests_until or is_limiting or is_at_limit:
            return
        if self.target < self._most:
            self._before = (self.target, rate)
            self._set(now, min(self._most, self.target * _STEP))

    def _set(self, now: float, target: int) -> None:
        self.target = target
        self._changed_at = now
        self._window = None
