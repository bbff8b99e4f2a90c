"""What keeps systemd from taking the service for hung, and what is said where it hangs."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from logging.handlers import QueueHandler

import pytest

from studio_worker.appliance import watchdog
from studio_worker.appliance.news import News
from studio_worker.appliance.watchdog import start_watchdog
from studio_worker.context import add_names
from studio_worker.report.notify import Notifier
from studio_worker.work.desk import Desk
from tests.lab.worker import job

LIMIT_S = 20.0


@pytest.fixture
def told() -> Iterator[queue.Queue[logging.LogRecord]]:
    """What is logged, also in threads that nobody waits for."""
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    handler = QueueHandler(records)
    handler.addFilter(add_names)
    logging.getLogger().addHandler(handler)
    yield records
    logging.getLogger().removeHandler(handler)


def test_hang_is_told_also_where_no_systemd_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, where nobody feeds on WATCHDOG=1, status says what hangs, and that it goes on again."""
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.setattr(watchdog, "UNWATCHED_S", 0.001)
    news, ended, seen = News(), threading.Event(), queue.Queue[str]()
    hangs = iter([True, False])

    def is_stuck() -> bool:
        seen.put(news.activity.snapshot().hangs)
        if (now := next(hangs, None)) is None:
            ended.set()
        return bool(now)

    start_watchdog(news.notifier, {"it makes no progress": is_stuck}, ended, Desk().about_job)
    assert [seen.get(timeout=LIMIT_S) for _ in range(3)] == ["", "it makes no progress", ""]


@pytest.mark.parametrize("job_id", ["a", None])
def test_line_about_a_job_that_hangs_names_it(
    monkeypatch: pytest.MonkeyPatch, told: queue.Queue[logging.LogRecord], job_id: str | None
) -> None:
    """The last line before systemd ends a service that hangs says in which job it does, if in one."""
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    desk, ended = Desk(), threading.Event()
    if job_id is not None:
        desk.put(job(job_id))

    def is_stuck() -> bool:
        ended.set()
        return True

    start_watchdog(Notifier(), {"it makes no progress": is_stuck}, ended, desk.about_job)
    line = told.get(timeout=LIMIT_S)
    assert line.getMessage() == "it makes no progress"
    assert getattr(line, "job_id", None) == job_id
