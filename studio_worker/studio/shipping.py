"""Log lines as the studio wants them: level and category mapped, facts appended, secrets redacted."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

from studio_worker.logs import ShippingBuffer, facts, redact
from studio_worker.studio.wire import LogEntry

_ENTRIES_A_BATCH = 100


def next_batch(buffer: ShippingBuffer) -> tuple[LogEntry, ...]:
    """The oldest lines of ``buffer``, and a line that counts the lost ones where there are any."""
    records, lost = buffer.take(_ENTRIES_A_BATCH)
    entries = [_entry(record) for record in records]
    if lost:
        entries.append(_lost_entry(lost))
    return tuple(entries)


def _entry(record: logging.LogRecord) -> LogEntry:
    """A log line as the studio wants it; facts are appended to the constant message."""
    fields = facts(record)
    job_id = fields.pop("job_id", None)
    category = str(fields.pop("op", record.name.rpartition(".")[2]))
    text = " ".join([record.getMessage(), *(f"{key}={value}" for key, value in fields.items())])
    if record.levelno >= logging.ERROR:
        level = "error"
    else:
        level = "warn" if record.levelno >= logging.WARNING else "info"
    return LogEntry(
        ts=_iso(record.created),
        level=level,
        category=category,
        message=redact(text),
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
