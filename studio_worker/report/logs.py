"""Log lines: JSON for journald, readable text for a terminal, and a bounded buffer for the studio.

One JSON object a line on stderr: ``timestamp``, ``level``, ``logger``, ``message`` (constant text) and
facts as fields: those of the call, and what the work at hand is called (``context.py``). In the journal they
are fields of the entry too, so that ``journalctl JOB_ID=…`` works.
Every line is redacted on its way out: registered secrets are replaced wherever they appear, in messages,
fields and tracebacks. Prompts are never given to a logger in the first place.
"""

from __future__ import annotations

import collections
import copy
import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from studio_worker import context
from studio_worker.errors import ConfigError
from studio_worker.plain import plain, plain_lines
from studio_worker.report import journal
from studio_worker.report.journal import Journal, field_name

LogFormat = Literal["auto", "json", "text"]

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""Syslog priorities for the ``<N>`` prefix that journald reads (sd-daemon(3))."""

_NOISY = ("alembic", "urllib3", "websockets", "uvicorn", "asyncio", "httpx", "httpcore", "PIL", "filelock",
          "diffusers", "transformers", "huggingface_hub", "accelerate", "torch")  # fmt: skip
"""Libraries whose warnings would be noise or, in diffusers' and transformers' case, quote the prompt."""

_RESERVED = [*RESERVED_ATTRS, "color_message"]
"""Attributes of a record that are no facts; ``color_message`` is uvicorn's second copy of a message."""

_FIRST = ("op", *context.NAMES)
"""What a line is about stands before what it says."""

IDENTIFIER = "studio-worker"
"""What ``journalctl -t`` finds."""

_FIELD_CHARS = 256
"""A longer fact is no field of a journal entry by itself."""

_JOURNALS_OWN = ("MESSAGE_ID", "CODE_FILE", "CODE_LINE", "CODE_FUNC", "ERRNO", "INVOCATION_ID", "UNIT",
                 "USER_UNIT", "SYSLOG_FACILITY", "SYSLOG_PID", "TID", "COREDUMP_UNIT")  # fmt: skip
"""Names that mean something else in the journal (systemd.journal-fields(7))."""

_secrets: tuple[str, ...] = ()
_adding = threading.Lock()


def add_secret(secret: str) -> None:
    """From now on ``secret`` appears as ``[redacted]`` in every line, also as JSON or a URL writes it."""
    global _secrets
    if len(secret) < 8:  # anything shorter would blot out ordinary words
        return
    in_json = (json.dumps(secret, ensure_ascii=escaped)[1:-1] for escaped in (False, True))
    forms = {secret, *in_json, quote(secret, safe="", errors="replace")}
    with _adding:  # a reload and a registration may come with theirs at once
        # The longest first: a secret that begins with another one must not leave its end behind.
        _secrets = tuple(sorted(forms | set(_secrets), key=len, reverse=True))


def redact(text: str) -> str:
    """``text`` without any registered secret."""
    for secret in _secrets:
        text = text.replace(secret, "[redacted]")
    return text


def facts(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a line: what its work is called (``context.py``), and what the call gave by ``extra``."""
    found = {k: v for k, v in record.__dict__.items() if k not in _RESERVED and not k.startswith("_")}
    return {name: found[name] for name in _FIRST if name in found} | found


class _Json(JsonFormatter):
    def __init__(self) -> None:
        super().__init__(
            "%(message)s",
            reserved_attrs=_RESERVED,
            json_ensure_ascii=False,
            json_default=str,
        )

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        log_data["timestamp"] = stamp.replace("+00:00", "Z")
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        super().add_fields(log_data, record, message_dict)
        for name, value in log_data.items():
            if isinstance(value, str):
                log_data[name] = plain_lines(value)

    def format(self, record: logging.LogRecord) -> str:
        return plain(redact(super().format(record)))


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        head, newline, traceback = super().format(record).partition("\n")
        fields = " ".join(f"{k}={_plain(v)}" for k, v in facts(record).items())
        return redact(plain(f"{head}  {fields}".rstrip()) + newline + plain_lines(traceback))


def _plain(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text.split() == [text] else json.dumps(text, ensure_ascii=False)


class _JournalHandler(logging.StreamHandler[IO[str]]):
    """Into the journal with every fact as a field; where that fails, through the stream that it reads too.

    A line goes one way or the other, never both.
    """

    def __init__(self, stream: IO[str], socket_path: Path) -> None:
        super().__init__(stream)
        self._journal = Journal(socket_path)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._journal.send(self._fields(record))
        except OSError:
            super().emit(record)
        except Exception:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """For the stream: each line with its priority."""
        prefix = f"<{_priority(record)}>"
        return prefix + self._line(record).replace("\n", f"\n{prefix}")

    def close(self) -> None:
        self._journal.close()
        super().close()

    def _line(self, record: logging.LogRecord) -> str:
        return super().format(record)

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        fields = {}
        for name, value in facts(record).items():
            # What is long, or a list, is in the message; nobody looks for a line by it.
            if isinstance(value, str | int | float) and len(text := redact(str(value))) <= _FIELD_CHARS:
                fields[field_name(name)] = plain_lines(text)
        for name in ("", *_JOURNALS_OWN):
            fields.pop(name, None)
        return fields | {
            "MESSAGE": self._line(record),
            "PRIORITY": str(_priority(record)),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "LOGGER": record.name,
        }


def _priority(record: logging.LogRecord) -> int:
    return _PRIORITIES.get(record.levelno, 6)


class ShippingBuffer(logging.Handler):
    """The last lines for the studio's ``logBatch``: bounded; what overflows is counted, never blocks."""

    def __init__(self, capacity: int = 2000) -> None:
        super().__init__(logging.INFO)
        self.addFilter(context.add_names)
        self._lines: collections.deque[logging.LogRecord] = collections.deque()
        self._capacity = capacity
        self._lost = 0
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        # A traceback holds its frames, and those what is in device memory, for as long as the line waits.
        record = copy.copy(record)
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        with self._guard:
            if len(self._lines) >= self._capacity:
                self._lines.popleft()
                self._lost += 1
            self._lines.append(record)

    def give_back(self, lines: Sequence[logging.LogRecord], lost: int = 0) -> None:
        """``lines`` that were taken did not leave: they come first again, the newest of them that fit.

        Args:
            lost: lines beside them that are given up, to be counted.
        """
        with self._guard:
            fitting = lines[max(0, len(lines) + len(self._lines) - self._capacity) :]
            self._lost += lost + len(lines) - len(fitting)
            self._lines.extendleft(reversed(fitting))

    def take(self, at_most: int) -> tuple[list[logging.LogRecord], int]:
        """The oldest lines, and how many were lost since the last call."""
        with self._guard:
            lines = [self._lines.popleft() for _ in range(min(at_most, len(self._lines)))]
            lost, self._lost = self._lost, 0
            return lines, lost


def journald_listens(stream: IO[str]) -> bool:
    """Whether ``stream`` goes to journald: ``JOURNAL_STREAM`` holds its device and inode, systemd.exec(5)."""
    wanted = os.environ.get("JOURNAL_STREAM", "")
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return wanted == f"{stat.st_dev}:{stat.st_ino}"


def configure(
    level: str = "info",
    fmt: LogFormat = "auto",
    stream: IO[str] | None = None,
    journal_socket: Path = journal.SOCKET,
) -> None:
    """Send every log line to ``stream`` (stderr). ``auto`` means text on a terminal and JSON elsewhere.

    Where journald reads the stream, lines go to ``journal_socket`` instead, with fields of their own.
    """
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise ConfigError(
            f"unknown level {level!r}", cure="use debug, info, warning or error", key="log.level"
        )
    stream = stream or sys.stderr
    listens = journald_listens(stream)
    handler = _JournalHandler(stream, journal_socket) if listens else logging.StreamHandler(stream)
    is_text = fmt == "text" or (fmt == "auto" and stream.isatty())
    handler.setFormatter(_Text() if is_text else _Json())
    handler.addFilter(context.add_names)
    root = logging.getLogger()
    before = [h for h in root.handlers if isinstance(h, _JournalHandler)]
    root.handlers = [h for h in root.handlers if isinstance(h, ShippingBuffer)] + [handler]
    for old in before:
        old.close()  # whoever is about to use it comes to the stream
    root.setLevel(number)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
