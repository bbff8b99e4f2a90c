"""The rest of one file over several connections at once, written in place, hashed in order behind them.

Owns the pieces: who fetches what, who takes over what is slow. How many connections there are is pace.py's
to say; what one of them does is range_reader.py's. A thread of its own hashes what has arrived, from memory
where it is the next, from the page cache where it came before its turn; memory does not grow with the file.
Knows nothing of tries and delays: raises when no connection brings anything, with everything that came kept.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable

from studio_worker.box.process import keep_freed_memory
from studio_worker.context import carried
from studio_worker.errors import DownloadError
from studio_worker.transfer.answer import Body
from studio_worker.transfer.asking import Target
from studio_worker.transfer.head import UnwantedStatus
from studio_worker.transfer.pace import Pace, Work
from studio_worker.transfer.policy import Policy
from studio_worker.transfer.range_reader import FileChanged, RangeReader, RangesIgnored, total_work
from studio_worker.transfer.spans import Spans
from studio_worker.transfer.staging import Staged
from studio_worker.transfer.wanted import Caller

PARALLEL_BYTES = 16 * 1024 * 1024
"""What is smaller is fetched by one connection, as a plain stream."""

_TICK_S = 0.02
_HASH_TICK_S = 0.005
_LARGEST_PIECE = 32 * 1024 * 1024
_SMALLEST_PIECE = 4 * 1024 * 1024
_AHEAD = 8 * 1024 * 1024
"""So much is reserved for an answer that goes on; the others fetch what is behind."""
_SMALLEST_SHARE = 512 * 1024
"""A piece is not divided into shares smaller than this."""
_SLOW_SHARE = 0.1
"""A connection below this share of the others' rate is replaced."""


class Ranges:
    """What is missing of one file.

    Args:
        total: the file's length.
        validator: what every answer must be an answer for, where it is known.
    """

    def __init__(
        self,
        staged: Staged,
        target: Target,
        policy: Policy,
        caller: Caller,
        *,
        total: int,
        validator: str | None,
    ) -> None:
        self.total = total
        self.validator = validator
        self.largest = 0
        """The largest number of connections that were used at once."""
        self.requests = 1
        """How many answers the bytes are from."""
        self._staged = staged
        self._target = target
        self._policy = policy
        self._caller = caller
        self._pace = Pace(limit=policy.limit.bytes_per_s if policy.limit else None)
        self._lock = threading.RLock()
        self._free = Spans()
        """What is missing and nobody fetches."""
        self._lines: list[RangeReader] = []
        self._errors: list[Exception] = []
        self._moved = (time.monotonic(), -1)  # when there were more bytes than before, and how many
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._hashing_s = 0.0
        self._ended = Work(0.0, 0, 0)
        """What the connections took that are gone."""
        self._disk_error: Exception | None = None

    def hold_at_one(self) -> None:
        """One connection must do."""
        self._pace.hold_at_one()

    def receive(self, body: Body, start: int, end: int) -> None:
        """Everything that is missing; ``body`` is the answer that has begun, for ``[start, end)``.

        Raises:
            DownloadError: no connection brings anything more.
            DownloadCancelled: the cancel event is set.
            OSError: the disk refuses.
        """
        keep_freed_memory()
        self._staged.split(self.total)
        for gap in self._staged.missing(self.total):
            self._free.add(*gap)
        hasher = threading.Thread(target=carried(self._hash), name="download-hash", daemon=True)
        hasher.start()
        # Not waited for in the end: a slow disk must not hold up a stop.
        threading.Thread(target=carried(self._sync), name="download-sync", daemon=True).start()
        try:
            self._begin(body, start, end)
            while self._staged.hashed < self.total:
                self._changed.wait(_TICK_S)
                self._changed.clear()
                self._caller.moved(self._staged.kept, self.total)
                if self._disk_error is not None:
                    raise self._disk_error
                if self._staged.kept < self.total:
                    self._tend(time.monotonic())
            self._caller.moved(self.total, self.total)
        finally:
            self._stop.set()
            with self._lock:
                lines = list(self._lines)
            for line in lines:
                line.leave()
            hasher.join()

    # --- what the lines ask for; from their threads ---

    def take(self, line: RangeReader) -> bool:
        """Give ``line`` the next free piece, or a share of the one that would be done last."""
        with self._lock:
            if self._stop.is_set() or line not in self._lines or len(self._lines) > self._pace.target:
                return False
            piece = self._next_piece() or self._share(line)
            if piece is None:
                return False
            start, end = piece
            self.requests += 1
            self._free.remove(start, end)
            with line.lock:
                line.at, line.end = start, end
                # One connection alone goes on to the end: nothing is lost between two pieces.
                line.is_open = self._pace.target == 1 and self._free.end_from(end) == self.total
            return True

    def extend(self, line: RangeReader) -> bool:
        """Let ``line``, whose answer goes on, have what is free behind its piece."""
        with self._lock:
            end = min(self._free.end_from(line.end), line.end + _AHEAD)
            if self._stop.is_set() or line not in self._lines or end == line.end:
                return False
            self._free.remove(line.end, end)
            with line.lock:
                line.end = end
            return True

    def ended(self, line: RangeReader, error: Exception | None) -> None:
        """``line`` is done or broken; what it has not fetched is free again."""
        with self._lock:
            if line in self._lines:
                self._lines.remove(line)
                self._ended = total_work(self._ended, line)
                self._free.add(line.at, line.end)
                if error is not None:
                    self._errors.append(error)
        self._changed.set()

    def _next_piece(self) -> tuple[int, int] | None:
        first = next(iter(self._free), None)
        if first is None:
            return None
        share = self._free.total // (2 * self._pace.target)  # the last ones are small: all end at one time
        size = min(_LARGEST_PIECE, max(_SMALLEST_PIECE, share))
        start, end = first
        # What would be left over is not worth a request of its own.
        return (start, end) if end - start < size + _SMALLEST_SHARE else (start, start + size)

    def _share(self, helper: RangeReader) -> tuple[int, int] | None:
        """Half of what the slowest connection still has to fetch, where that is worth a request."""
        now = time.monotonic()
        slowest: RangeReader | None = None
        longest_s = 0.1
        for line in self._lines:
            rate = line.rate(now)
            left_s = (line.end - line.at) / rate if rate else float("inf")
            if line is not helper and line.end - line.at >= 2 * _SMALLEST_SHARE and left_s > longest_s:
                slowest, longest_s = line, left_s
        if slowest is None or longest_s < 2 * max(slowest.first_byte_s, helper.first_byte_s):
            return None
        with slowest.lock:
            middle = slowest.at + (slowest.end - slowest.at) // 2
            if slowest.end - middle < _SMALLEST_SHARE:
                return None
            piece = (middle, slowest.end)
            slowest.end = middle
        return piece

    # --- the caller's thread ---

    def _begin(self, body: Body, start: int, end: int) -> None:
        line = RangeReader(self._target, self._policy, self._staged, self)
        with self._lock:
            line.at, line.end = start, min(end, start + _AHEAD)
            line.is_open = line.end < end
            self._free.remove(line.at, line.end)
            self._lines.append(line)
            self.largest = max(self.largest, 1)
        line.start(body)

    def _tend(self, now: float) -> None:
        """See to the connections: those that ended, are slow, are too many, or are to be added."""
        self._note_errors(now)
        self._replace_slow(now)
        self._see_that_it_moves(now)
        share = self._policy.connections.share
        self._pace.allow(now, share)
        self._drop(list(self._lines)[share:])
        delivering = sum(line.is_delivering for line in list(self._lines))
        work = total_work(self._ended, *list(self._lines))
        work = work._replace(busy_s=work.busy_s + self._hashing_s)
        self._pace.note(now, self._staged.kept, delivering, work)
        while len(self._lines) < self._pace.target:
            line = RangeReader(self._target, self._policy, self._staged, self)
            with self._lock:
                self._lines.append(line)
                if not self.take(line):
                    self._lines.remove(line)
                    return
                self.largest = max(self.largest, len(self._lines))
            try:
                line.start()
            except RuntimeError:  # no threads left: those that run bring it, too
                self.ended(line, None)
                self._pace.refused(now, delivering)
                return

    def _note_errors(self, now: float) -> None:
        with self._lock:
            errors, self._errors = self._errors, []
            delivering = len(self._lines)
        for error in errors:
            if isinstance(error, FileChanged) or not isinstance(error, DownloadError):
                raise error
            if isinstance(error, RangesIgnored):
                self._pace.hold_at_one()
            else:
                rest_s = error.retry_after_s if isinstance(error, UnwantedStatus) else None
                self._pace.refused(now, delivering, rest_s)
        if errors and not delivering:
            raise errors[-1]

    def _replace_slow(self, now: float) -> None:
        """Take their pieces from connections that are silent, or much slower than the others."""
        with self._lock:
            lines = list(self._lines)
        rates = []
        for line in lines:
            since, before = line.mark
            if now - since >= self._policy.slow_s:
                rates.append((line, (line.received - before) / (now - since)))
                line.mark = (now, line.received)
        usual = statistics.median(rate for _, rate in rates) if rates else 0.0
        is_limited = self._policy.limit is not None
        slow = {line for line, rate in rates if rate < _SLOW_SHARE * usual and not is_limited}
        silent = {line for line in lines if now - line.moved_at > line.patience_s and not is_limited}
        self._drop(slow | silent)
        if lines and silent == set(lines):
            raise self._no_byte(max(line.patience_s for line in silent))

    def _see_that_it_moves(self, now: float) -> None:
        """Connections that are replaced for ever, each before its own limit, bring nothing either."""
        if (kept := self._staged.kept) != self._moved[1]:
            self._moved = (now, kept)
        if now - self._moved[0] > self._policy.silence_s and self._policy.limit is None:
            raise self._no_byte(self._policy.silence_s)

    def _no_byte(self, seconds: float) -> DownloadError:
        what = f"streaming body: no byte for {seconds:g} s"
        return DownloadError("streaming body", f"GET {self._target.name}: {what}")

    def _drop(self, lines: Iterable[RangeReader]) -> None:
        for line in lines:
            line.leave()
            self.ended(line, None)

    # --- threads beside the lines ---

    def _hash(self) -> None:
        try:
            while not self._stop.is_set() and self._staged.hashed < self.total:
                self._staged.hash_more(patience_s=_HASH_TICK_S)
                self._hashing_s = time.thread_time()
        except Exception as error:
            self._disk_error = error
        self._changed.set()

    def _sync(self) -> None:
        try:
            while not self._stop.wait(self._policy.sync_s):
                self._staged.sync()
        except Exception as error:
            self._disk_error = error
            self._changed.set()
