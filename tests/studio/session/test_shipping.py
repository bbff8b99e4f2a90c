"""What the studio gets of the log: bounded, redacted, and nothing lost with a connection."""

from __future__ import annotations

import logging
from typing import Any

from studio_worker.report import logs
from studio_worker.report.logs import ShippingBuffer
from studio_worker.studio.session.shipping import Shipping


def line(message: str, level: int = logging.INFO, **facts: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "studio_worker.x", "levelno": level, "msg": message, **facts})


def filled(*messages: str, capacity: int = 100) -> ShippingBuffer:
    buffer = ShippingBuffer(capacity)
    for message in messages:
        buffer.emit(line(message))
    return buffer


def messages(shipping: Shipping) -> list[str]:
    return [entry.message for entry in shipping.next_batch()]


def test_shipping_gives_levels_categories_and_job_ids() -> None:
    """Errors are errors, warnings warn, all else info; the category is the operation or the module."""
    buffer = ShippingBuffer()
    buffer.emit(line("a", logging.CRITICAL, op="job", job_id="j1", model="m"))
    buffer.emit(line("b", logging.WARNING))
    buffer.emit(line("c", logging.INFO))
    entries = Shipping(buffer).next_batch()
    assert [(e.level, e.category, e.message, e.job_id) for e in entries[:2]] == [
        ("error", "job", "a model=m", "j1"), ("warn", "x", "b", None),
    ]  # fmt: skip
    assert entries[2].level == "info"


def test_shipping_redacts_secrets() -> None:
    """A secret in a message or a fact does not leave the box."""
    logs.add_secret("hunter2-hunter2")
    buffer = ShippingBuffer()
    buffer.emit(line("token hunter2-hunter2", error="hunter2-hunter2 refused"))
    (entry,) = Shipping(buffer).next_batch()
    assert entry.message == "token [redacted] error=[redacted] refused"


def test_shipping_says_first_how_much_was_lost() -> None:
    """Lines that did not fit are counted, and said before the ones that came after them."""
    shipping = Shipping(filled("1", "2", "3", "4", "5", capacity=3))
    assert messages(shipping) == ["2 log lines were lost: more than the buffer holds", "3", "4", "5"]
    assert messages(shipping) == []


def test_shipping_bounds_every_frame() -> None:
    """A long line is shortened, and a batch of long ones spread over several frames; none is lost."""
    shipping = Shipping(filled(*(f"{number:02} " + "ü" * 20_000 for number in range(90))))
    seen: list[str] = []
    while batch := messages(shipping):
        assert sum(len(message.encode()) for message in batch) <= 256 * 1024
        seen += batch
    assert [message[:2] for message in seen] == [f"{number:02}" for number in range(90)]
    assert all(len(message) == 8000 and message.endswith("…") for message in seen)


def test_shipping_gives_back_what_no_acknowledged_heartbeat_covers() -> None:
    """What was sent before an acknowledged heartbeat has arrived; the rest goes out on the next one."""
    buffer = filled("1")
    first = Shipping(buffer)
    assert messages(first) == ["1"]
    first.beat()
    buffer.emit(line("2"))
    assert messages(first) == ["2"]
    first.beat_acknowledged()
    first.beat()
    buffer.emit(line("3"))
    first.end()
    second = Shipping(buffer)
    assert messages(second) == ["2", "3"]


def test_shipping_does_not_send_for_ever_what_ends_connections() -> None:
    """A line that was under way when two connections ended is given up, and counted."""
    buffer = filled("poison")
    for _ in range(2):
        shipping = Shipping(buffer)
        assert messages(shipping) == ["poison"]
        shipping.end()
    assert messages(Shipping(buffer)) == ["1 log lines were lost: more than the buffer holds"]


def test_buffer_keeps_its_bound_when_lines_come_back() -> None:
    """Lines that come back are older than those that came meanwhile: of them the oldest go first."""
    buffer = filled("1", "2", capacity=3)
    shipping = Shipping(buffer)
    assert messages(shipping) == ["1", "2"]
    for message in ("3", "4"):
        buffer.emit(line(message))
    shipping.end()
    assert messages(Shipping(buffer)) == ["1 log lines were lost: more than the buffer holds", "2", "3", "4"]
