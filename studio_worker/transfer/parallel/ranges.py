"""The rest of one file over several connections at once, written in place, hashed in order behind them.

Owns who fetches what, and who takes over what is slow. How many connections there are is pace.py's to say,
how large their pieces are pieces.py's; what one of them does is range_reader.py's. A thread of its own hashes
what has arrived, from memory where it is the next, from the page cache where it came before its turn; memory
does not grow with the file. Knows nothing of tries and delays: raises when no connection brings anything,
with everything that came kept.
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
from studio_worker.transfer.parallel.pace import Pace, Work
from studio_worker.transfer.parallel.pieces import next_piece, share_of_slowest
from studio_worker.transfer.parallel.range_reader import FileChanged, RangeReader, RangesIgnored, total_work
from studio_worker.transfer.policy import Policy
from studio_worker.transfer.spans import Spans
from studio_worker.transfer.staging import Staged
from studio_worker.transfer.wanted import Caller

PARALLEL_BYTES = 16 * 1024 * 1024
"""What is smaller is fetched by one connection, as a plain stream."""

_TICK_S = 0.02
_HASH_TICK_S = 0.005
_AHEAD = 8 * 1024 * 1024
"""So much is reserved for an answer that goes on; the others fetch what is behind."""
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
        self._readers: list[RangeReader] = []
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
                readers = list(self._readers)
            for reader in readers:
                reader.leave()
            hasher.join()

    # --- what the readers ask for; from their threads ---

    def take(self, reader: RangeReader) -> bool:
        """Give ``reader`` the next free piece, or a share of the one that would be done last."""
        with self._lock:
            if self._stop.is_set() or reader not in self._readers or len(self._readers) > self._pace.target:
                return False
            piece = next_piece(self._free, self._pace.target) or share_of_slowest(self._readers, reader)
            if piece is None:
                return False
            start, end = piece
            self.requests += 1
            self._free.remove(start, end)
            with reader.lock:
                reader.at, reader.end = start, end
                # One connection alone goes on to the end: nothing is lost between two pieces.
                reader.is_open = self._pace.target == 1 and self._free.end_from(end) == self.total
            return True

    def extend(self, reader: RangeReader) -> bool:
        """Let ``reader``, whose answer goes on, have what is free behind its piece."""
        with self._lock:
            end = min(self._free.end_from(reader.end), reader.end + _AHEAD)
            if self._stop.is_set() or reader not in self._readers or end == reader.end:
                return False
            self._free.remove(reader.end, end)
            with reader.lock:
                reader.end = end
            return True

    def ended(self, reader: RangeReader, error: Exception | None) -> None:
        """``reader`` is done or broken; what it has not fetched is free again."""
        with self._lock:
            if reader in self._readers:
                self._readers.remove(reader)
                self._ended = total_work(self._ended, reader)
                self._free.add(reader.at, reader.end)
                if error is not None:
                    self._errors.append(error)
        self._changed.set()

    # --- the caller's thread ---

    def _begin(self, body: Body, start: int, end: int) -> None:
        reader = RangeReader(self._target, self._policy, self._staged, self)
        with self._lock:
            reader.at, reader.end = start, min(end, start + _AHEAD)
            reader.is_open = reader.end < end
            self._free.remove(reader.at, reader.end)
            self._readers.append(reader)
            self.largest = max(self.largest, 1)
        reader.start(body)

    def _tend(self, now: float) -> None:
        """See to the connections: those that ended, are slow, are too many, or are to be added."""
        self._note_errors(now)
        self._replace_slow(now)
        self._see_that_it_moves(now)
        share = self._policy.connections.share
        self._pace.allow(now, share)
        self._drop(list(self._readers)[share:])
        delivering = sum(reader.is_delivering for reader in list(self._readers))
        work = total_work(self._ended, *list(self._readers))
        work = work._replace(busy_s=work.busy_s + self._hashing_s)
        if self._policy.uplink.is_taken:
            self._pace.interrupted()
        else:
            self._pace.note(now, self._staged.kept, delivering, work)
        while len(self._readers) < self._pace.target:
            reader = RangeReader(self._target, self._policy, self._staged, self)
            with self._lock:
                self._readers.append(reader)
                if not self.take(reader):
                    self._readers.remove(reader)
                    return
                self.largest = max(self.largest, len(self._readers))
            try:
                reader.start()
            except RuntimeError:  # no threads left: those that run bring it, too
                self.ended(reader, None)
                self._pace.refused(now, delivering)
                return

    def _note_errors(self, now: float) -> None:
        with self._lock:
            errors, self._errors = self._errors, []
            delivering = len(self._readers)
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
            readers = list(self._readers)
        rates = []
        for reader in readers:
            since, before = reader.mark
            if now - since >= self._policy.slow_s:
                rates.append((reader, (reader.received - before) / (now - since)))
                reader.mark = (now, reader.received)
        usual = statistics.median(rate for _, rate in rates) if rates else 0.0
        is_limited = self._policy.limit is not None or self._policy.uplink.is_taken
        slow = {reader for reader, rate in rates if rate < _SLOW_SHARE * usual and not is_limited}
        silent = {
            reader for reader in readers if now - reader.moved_at > reader.patience_s and not is_limited
        }
        self._drop(slow | silent)
        if readers and silent == set(readers):
            raise self._no_byte(max(reader.patience_s for reader in silent))

    def _see_that_it_moves(self, now: float) -> None:
        """Connections that are replaced for ever, each before its own limit, bring nothing either."""
        if (kept := self._staged.kept) != self._moved[1]:
            self._moved = (now, kept)
        if now - self._moved[0] > self._policy.silence_s and self._policy.limit is None:
            raise self._no_byte(self._policy.silence_s)

    def _no_byte(self, seconds: float) -> DownloadError:
        what = f"streaming body: no byte for {seconds:g} s"
        return DownloadError("streaming body", f"GET {self._target.name}: {what}")

    def _drop(self, readers: Iterable[RangeReader]) -> None:
        for reader in readers:
            reader.leave()
            self.ended(reader, None)

    # --- threads beside the readers ---

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
