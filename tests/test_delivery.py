"""Emptying the outbox against a real HTTP server."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from studio_worker.activity import Activity
from studio_worker.jobs import ImageTask, Job, Picture
from studio_worker.models import ModelSource
from studio_worker.outbox import Outbox
from studio_worker.studio.api import StudioApi
from studio_worker.studio.delivery import Courier, Patience
from studio_worker.studio.identity import Credentials
from tests.scripted import LIMIT_S, ScriptedHttp

OK = (200, {}, {})


class Told:
    """What the courier reports."""

    def __init__(self) -> None:
        self.delivered: list[str] = []
        self.unacceptable: list[tuple[str, str]] = []
        self.lost: list[tuple[str, str]] = []
        self.settled: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.activity = Activity()
        self._changed = threading.Condition()

    def note_delivered(self, job_id: str) -> None:
        with self._changed:
            self.delivered.append(job_id)
            self._changed.notify_all()

    def note_unacceptable(self, job_id: str, reason: str) -> None:
        with self._changed:
            self.unacceptable.append((job_id, reason))
            self._changed.notify_all()

    def note_lost(self, job_id: str, reason: str) -> None:
        with self._changed:
            self.lost.append((job_id, reason))
            self._changed.notify_all()

    def await_count(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self.delivered) + len(self.unacceptable) + len(self.lost) >= count, LIMIT_S
            )


def add(outbox: Outbox, job_id: str) -> None:
    """A finished picture in the outbox."""
    made = Job(job_id, "m", ImageTask(prompt="a hidden castle"), ModelSource(engine="synthetic"))
    outbox.add(made, Picture(b"bytes of " + job_id.encode(), "png", {"seed": 1}), {"generate": 0.25})
    outbox.wake()


@contextmanager
def courier(outbox: Outbox, url: str) -> Iterator[tuple[Courier, Told, threading.Thread]]:
    """A courier at work on its thread."""
    told = Told()
    running = Courier(
        outbox,
        StudioApi(url),
        on_delivered=told.note_delivered,
        on_unacceptable=told.note_unacceptable,
        on_lost=told.note_lost,
        on_settled=told.settled.put,
        reports=told.activity,
        patience=Patience(base_s=0.01, cap_s=0.05),
    )
    thread = threading.Thread(target=running.run, args=(Credentials("w1", "token"),), daemon=True)
    thread.start()
    yield running, told, thread
    running.stop()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


def test_courier_delivers_what_waits_oldest_first(outbox: Outbox) -> None:
    """Pictures of an earlier process and new ones are delivered in order and leave the outbox."""
    add(outbox, "a")
    with ScriptedHttp(OK, OK) as server, courier(outbox, server.url) as (_, told, _):
        told.await_count(1)
        add(outbox, "b")
        told.await_count(2)
    assert told.delivered == ["a", "b"]
    assert outbox.oldest() == []
    assert [heard.path.split("/")[-2] for heard in server.heard] == ["a", "b"]


@pytest.mark.parametrize(
    "passing", [(500, {}, {}), (503, {}, {}), (429, {"Retry-After": "0"}, {}), (408, {}, {})]
)
def test_courier_keeps_a_picture_through_passing_errors(outbox: Outbox, passing: Any) -> None:
    """A studio that is down for a while gets the same picture when it is back."""
    add(outbox, "a")
    with (
        ScriptedHttp(passing, passing, passing, OK) as server,
        courier(outbox, server.url) as (_, told, _),
    ):
        told.await_count(1)
    assert told.delivered == ["a"]
    assert len(server.heard) == 4
    assert outbox.oldest() == []


@pytest.mark.parametrize("status", [404, 409, 410])
def test_courier_drops_a_picture_whose_job_is_gone(
    outbox: Outbox, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that is another worker's by now is dropped with a log line, and nothing is failed."""
    add(outbox, "a")
    with caplog.at_level(logging.INFO), ScriptedHttp((status, {}, {})) as server:  # noqa: SIM117
        with courier(outbox, server.url) as (_, told, _):
            told.await_count(1)
    assert told.delivered == ["a"]
    assert told.unacceptable == []
    assert outbox.oldest() == []
    dropped = [r for r in caplog.records if r.message == "result refused for good and dropped"]
    assert [r.__dict__["status"] for r in dropped] == [status]


def test_courier_fails_a_job_whose_upload_is_unacceptable(outbox: Outbox) -> None:
    """An upload that the studio calls malformed is reported as failed, so that the job does not hang."""
    add(outbox, "a")
    with ScriptedHttp((422, {}, {})) as server, courier(outbox, server.url) as (_, told, _):
        told.await_count(1)
    assert told.unacceptable == [("a", "the studio refused the result: HTTP 422")]
    assert outbox.oldest() == []


def test_courier_keeps_a_picture_when_the_token_is_refused(outbox: Outbox, tmp_path: Path) -> None:
    """A refused token loses no picture: it waits for the worker to be registered again."""
    add(outbox, "a")
    with (
        ScriptedHttp((401, {}, {}), (401, {}, {})) as server,
        courier(outbox, server.url) as (running, _, thread),
    ):
        running.stop()
        thread.join(LIMIT_S)
    assert [d.job_id for d in Outbox(tmp_path / "outbox").oldest()] == ["a"]


def test_courier_keeps_a_picture_when_the_studio_is_gone(outbox: Outbox, tmp_path: Path) -> None:
    """A studio that cannot be reached at all loses no picture, and a stop is not held up by it."""
    with ScriptedHttp() as server:
        url = server.url
    add(outbox, "a")
    with courier(outbox, url):
        pass
    assert [d.job_id for d in Outbox(tmp_path / "outbox").oldest()] == ["a"]


def test_courier_told_to_stop_makes_one_last_round(outbox: Outbox) -> None:
    """A picture finished just before the stop is still delivered."""
    with ScriptedHttp(OK) as server, courier(outbox, server.url) as (running, told, thread):
        add(outbox, "a")
        running.stop()
        thread.join(LIMIT_S)
    assert told.delivered == ["a"]


def test_courier_logs_one_summary_line_a_finished_job(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    """A delivered job is one line with every stage in milliseconds, and no prompt."""
    add(outbox, "a")
    with caplog.at_level(logging.INFO), ScriptedHttp(OK) as server:  # noqa: SIM117
        with courier(outbox, server.url) as (_, told, _):
            told.await_count(1)
    lines = [r for r in caplog.records if r.message == "job done"]
    assert len(lines) == 1
    facts = lines[0].__dict__
    assert (facts["job_id"], facts["model"], facts["outcome"], facts["generate_ms"]) == (
        "a",
        "m",
        "done",
        250,
    )
    assert "upload_ms" in facts
    assert "castle" not in str(facts)
