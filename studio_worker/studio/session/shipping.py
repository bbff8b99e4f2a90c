"""Log lines as the studio wants them: level and category mapped, facts appended, secrets redacted."""

from __future__ import annotations

import logging
import time
from collections import deque
from datetime import UTC, datetime

from studio_worker.report.logs import ShippingBuffer, facts, redact
from studio_worker.studio.wire import LogEntry

_ENTRIES_A_BATCH = 100
_BATCH_BYTES = 256 * 1024
"""Of messages in one frame; a studio may refuse frames of a megabyte, the local one does."""
_MESSAGE_CHARS = 8000
_BATCHES_UNDER_WAY = 60
"""Many more than go out between two heartbeats; a studio that acknowledges none is given up after 20 s."""
_RETURNED = "_returned"


class Shipping:
    """What one connection ships from the log, and what of it the studio has.

    The protocol acknowledges no log batch, but it does acknowledge every heartbeat, in order: what was sent
    before an acknowledged heartbeat has arrived. The rest goes back into the buffer when the connection ends,
    for the next one; a line may so arrive twice, but none is lost with a connection. It goes back once: what
    is under way when a second connection ends may be what ends them.
    """

    def __init__(self, buffer: ShippingBuffer) -> None:
        self._buffer = buffer
        self._beats = 0
        self._acknowledged = 0
        self._under_way: deque[tuple[int, list[logging.LogRecord]]] = deque(maxlen=_BATCHES_UNDER_WAY)

    def next_batch(self) -> tuple[LogEntry, ...]:
        """The oldest lines, after a line that counts the lost ones where there are any."""
        records, lost = self._buffer.take(_ENTRIES_A_BATCH)
        entries = [_lost_entry(lost)] if lost else []
        size_bytes = 0
        for place, record in enumerate(records):
            entry = _entry(record)
            size_bytes += len(entry.message.encode(errors="replace"))
            if size_bytes > _BATCH_BYTES:
                self._buffer.give_back(records[place:])
                del records[place:]
                break
            entries.append(entry)
        if records:
            self._under_way.append((self._beats, records))
        return tuple(entries)

    def beat(self) -> None:
        """A heartbeat follows what was taken so far."""
        self._beats += 1

    def beat_acknowledged(self) -> None:
        self._acknowledged += 1
        while self._under_way and self._under_way[0][0] < self._acknowledged:
            self._under_way.popleft()

    def end(self) -> None:
        """The connection is over: what may not have arrived goes back."""
        records = [record for _, batch in self._under_way for record in batch]
        again = [record for record in records if not hasattr(record, _RETURNED)]
        for record in again:
            setattr(record, _RETURNED, True)
        self._buffer.give_back(again, lost=len(records) - len(again))
        self._under_way.clear()


def _entry(record: logging.LogRecord) -> LogEntry:
    """A log line as the studio wants it; facts are appended to the constant message."""
    fields = facts(record)
    job_id = fields.pop("job_id", None)
    category = str(fields.pop("op", record.name.rpartition(".")[2]))
    words = [record.getMessage(), *(f"{key}={value}" for key, value in fields.items())]
    text = redact(" ".join(words))
    if len(text) > _MESSAGE_CHARS:
        text = f"{text[: _MESSAGE_CHARS - 1]}…"
    if record.levelno >= logging.ERROR:
        level = "error"
    else:
        level = "warn" if record.levelno >= logging.WARNING else "info"
    return LogEntry(
        ts=_iso(record.created),
        level=level,
        category=category,
        message=text,
        job_id=None if job_id is None else str(job_id),
    )


def _lost_entry(lost: int) -> LogEntry:
    return LogEntry(
        ts=_iso(time.time()),
        level="warn",
        category="log",
        message=f"{lost} log lines were lost: more than the buffer holds",
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
