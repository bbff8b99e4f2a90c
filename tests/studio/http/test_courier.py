"""Emptying the outbox against a real HTTP server."""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from studio_worker.jobs import ImageTask, Job, Picture
from studio_worker.models import ModelSource
from studio_worker.report.activity import Activity
from studio_worker.spool.outbox import Outbox
from studio_worker.spool.part import OutboxPart
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.courier import Courier
from studio_worker.studio.http.identity import Credentials
from studio_worker.studio.http.uploads import Patience, Uploads
from tests.fakes.scripted import LIMIT_S, ScriptedHttp

OK = (200, {}, {})
FAST = Patience(base_s=0.01, cap_s=0.05)


class Told:
    """What the courier tells, and the uploads it knows of."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads
        self.delivered: list[str] = []
        self.unacceptable: list[tuple[str, str]] = []
        self.lost: list[tuple[str, str]] = []
        self.settled: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.activity = Activity()
        self._changed = threading.Condition()

    def note(self, known: list[Any], fact: object) -> None:
        with self._changed:
            known.append(fact)
            self._changed.notify_all()

    def give(self, seconds: float) -> None:
        """Let the courier work for so long."""
        threading.Event().wait(seconds)

    def await_count(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self.delivered) + len(self.unacceptable) + len(self.lost) >= count, LIMIT_S
            )


class Claims:
    """Who would tell the studio."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def delivered(self, job_id: str) -> None:
        self._told.note(self._told.delivered, job_id)

    def report_failure(self, job_id: str, error: str, *, retryable: bool) -> None:
        assert not retryable
        self._told.note(self._told.unacceptable, (job_id, error))

    def lost(self, job_id: str, error: str) -> None:
        self._told.note(self._told.lost, (job_id, error))

    def settled(self, job_id: str) -> None:
        self._told.settled.put(job_id)


def add(outbox: OutboxPart, job_id: str, **meta: Any) -> None:
    """A finished picture in the outbox."""
    made = Job(job_id, "m", ImageTask(prompt="a hidden castle"), ModelSource(engine="synthetic"))
    outbox.add(made, Picture(b"bytes of " + job_id.encode(), "png", {"seed": 1, **meta}), {"generate": 0.25})
    outbox.wake()


@contextmanager
def courier(
    outbox: OutboxPart,
    url: str,
    patience: Patience = FAST,
    *,
    worker_id: str = "w1",
    begins: bool = True,
) -> Iterator[tuple[Courier, Told, threading.Thread]]:
    """A courier at work on its thread."""
    uploads = Uploads(outbox, patience)
    told = Told(uploads)
    running = Courier(StudioApi(url), outbox, uploads, Claims(told), told.activity)
    thread = threading.Thread(target=running.run, args=(Credentials(worker_id, "token"),), daemon=True)
    if begins:
        thread.start()
    yield running, told, thread
    running.stop()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes nothing more."""

    def full(path: Path, content: bytes, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("studio_worker.spool.picture_files.write_atomic", full)


@pytest.fixture
def outbox(tmp_path: Path) -> OutboxPart:
    return OutboxPart(Outbox(tmp_path / "outbox"), 1)


def test_courier_delivers_what_waits_oldest_first(outbox: OutboxPart) -> None:
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
def test_courier_keeps_a_picture_through_passing_errors(outbox: OutboxPart, passing: Any) -> None:
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
    outbox: OutboxPart, status: int, caplog: pytest.LogCaptureFixture
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


def test_courier_fails_a_job_whose_upload_is_unacceptable(outbox: OutboxPart) -> None:
    """An upload that the studio calls malformed is reported as failed, so that the job does not hang."""
    add(outbox, "a")
    with ScriptedHttp((422, {}, {})) as server, courier(outbox, server.url) as (_, told, _):
        told.await_count(1)
    assert told.unacceptable == [("a", "the studio refused the result: HTTP 422")]
    assert outbox.oldest() == []


def test_courier_keeps_a_picture_when_the_token_is_refused(outbox: OutboxPart, tmp_path: Path) -> None:
    """A refused token loses no picture: it waits for the worker to be registered again."""
    add(outbox, "a")
    with (
        ScriptedHttp((401, {}, {}), (401, {}, {})) as server,
        courier(outbox, server.url) as (running, _, thread),
    ):
        running.stop()
        thread.join(LIMIT_S)
    assert [d.job_id for d in Outbox(tmp_path / "outbox").oldest()] == ["a"]


def test_courier_keeps_a_picture_when_the_studio_is_gone(outbox: OutboxPart, tmp_path: Path) -> None:
    """A studio that cannot be reached at all loses no picture, and a stop is not held up by it."""
    with ScriptedHttp() as server:
        url = server.url
    add(outbox, "a")
    with courier(outbox, url):
        pass
    assert [d.job_id for d in Outbox(tmp_path / "outbox").oldest()] == ["a"]


def test_courier_told_to_stop_makes_one_last_round(outbox: OutboxPart) -> None:
    """A picture finished just before the stop is still delivered."""
    with ScriptedHttp(OK) as server, courier(outbox, server.url) as (running, told, thread):
        add(outbox, "a")
        running.stop()
        thread.join(LIMIT_S)
    assert told.delivered == ["a"]


def test_courier_logs_one_summary_line_a_finished_job(
    outbox: OutboxPart, caplog: pytest.LogCaptureFixture
) -> None:
    """A delivered job is one line with every stage in milliseconds, the size that was made and the one that
    was asked for, and no prompt.
    """
    add(outbox, "a", width=64, height=72, askedWidth=66, askedHeight=70)
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
    assert (facts["size"], facts["asked_size"]) == ("64x72", "66x70")
    assert "upload_ms" in facts
    assert "castle" not in str(facts)


# --- nothing holds up anything ---


def test_courier_goes_on_past_a_picture_the_studio_stumbles_over(outbox: OutboxPart) -> None:
    """An upload that ends in HTTP 500 again and again waits by itself; those behind it are delivered."""
    add(outbox, "bad")
    add(outbox, "good")
    with (
        ScriptedHttp((500, {}, {}), OK, (500, {}, {}), OK) as server,
        courier(outbox, server.url) as (_, told, _),
    ):
        told.await_count(2)
    assert told.delivered == ["good", "bad"]
    assert [heard.path.split("/")[-2] for heard in server.heard] == ["bad", "good", "bad", "bad"]


def test_courier_asked_for_patience_is_patient_with_everything(outbox: OutboxPart) -> None:
    """Retry-After holds for all pictures, and no reconnect cuts it short."""
    add(outbox, "a")
    add(outbox, "b")
    with ScriptedHttp((429, {"Retry-After": "3600"}, {})) as server:  # noqa: SIM117
        with courier(outbox, server.url) as (_, told, _):
            waiting = outbox.oldest()
            while not server.heard:
                told.give(0.01)
            told.uploads.hurry()
            told.give(0.3)
    assert len(server.heard) == 1
    assert outbox.oldest() == waiting


def test_courier_tries_at_once_when_the_studio_is_there_again(outbox: OutboxPart) -> None:
    """A session that opens is a sign that uploads are worth a try, long before the backoff ends."""
    add(outbox, "a")
    patience = Patience(base_s=3600.0, cap_s=3600.0)
    with (
        ScriptedHttp((502, {}, {}), OK) as server,
        courier(outbox, server.url, patience) as (_, told, _),
    ):
        while not server.heard or told.uploads.under_way:
            told.give(0.01)
        told.uploads.hurry()
        told.await_count(1)
    assert told.delivered == ["a"]


def test_courier_goes_on_past_a_picture_it_cannot_read(
    outbox: OutboxPart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One file on a failing disk is logged and kept, and keeps no other picture from the studio."""
    add(outbox, "bad")
    (data,) = (tmp_path / "outbox").glob("*.data")
    add(outbox, "good")
    data.unlink()
    data.mkdir()  # reading it fails, as on a bad sector
    with ScriptedHttp(OK) as server, courier(outbox, server.url) as (_, told, _):
        told.await_count(1)
    assert told.delivered == ["good"]
    assert outbox.holds("bad")
    failed = [r.__dict__ for r in caplog.records if r.message == "delivery failed"]
    assert (failed[0]["job_id"], failed[0]["error"]) == ("bad", "Is a directory")
    assert "castle" not in str(failed)


@pytest.mark.usefixtures("full_disk")
def test_courier_delivers_from_memory_what_the_disk_did_not_take(outbox: OutboxPart) -> None:
    """A full disk costs no picture: it goes to the studio straight from memory."""
    add(outbox, "a")
    with ScriptedHttp(OK) as server, courier(outbox, server.url) as (_, told, _):
        told.await_count(1)
    assert told.delivered == ["a"]
    assert b"bytes of a" in server.heard[0].body


def test_courier_rids_a_mended_disk_of_what_it_delivered(
    outbox: OutboxPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a disk did not let go after its delivery goes once the disk is mended, without a further job."""
    is_gone = threading.Event()
    real = Path.unlink
    refused: list[Path] = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".json" and len(refused) < 3:
            refused.append(path)
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        real(path, missing_ok=missing_ok)
        if path.suffix == ".data":
            is_gone.set()

    monkeypatch.setattr(Path, "unlink", unlink)
    patience = Patience(disk_s=0.02)
    with ScriptedHttp(OK) as server, courier(outbox, server.url, patience) as (_, told, _):
        add(outbox, "job-1")
        told.await_count(1)
        assert is_gone.wait(LIMIT_S)
    assert len(refused) == 3
    assert not [path for path in (tmp_path / "outbox").iterdir() if path.suffix in {".json", ".data"}]


@pytest.mark.usefixtures("full_disk")
def test_courier_stopped_reports_what_only_memory_holds(outbox: OutboxPart) -> None:
    """A picture that would be lost with the process is given back as a job, with the reason."""
    add(outbox, "a")
    with ScriptedHttp((503, {"Retry-After": "60"}, {})) as server:  # noqa: SIM117
        with courier(outbox, server.url) as (running, told, thread):
            while not server.heard:
                told.give(0.01)
            running.stop()
            thread.join(LIMIT_S)
    assert told.lost == [("a", "the disk took no picture, and the worker is stopping")]


def test_courier_says_what_it_drops_for_its_age(tmp_path: Path) -> None:
    """A picture beyond the limit of days is dropped with a report, so that nobody waits for it."""
    now = [0.0]
    outbox = OutboxPart(Outbox(tmp_path / "outbox", max_age_s=10.0, clock=lambda: now[0]), 1)
    add(outbox, "a")
    now[0] = 11.0
    with ScriptedHttp() as server, courier(outbox, server.url) as (_, told, _):
        told.await_count(1)
    assert [job_id for job_id, _ in told.lost] == ["a"]
    assert "outbox_max_days" in told.lost[0][1]
    assert server.heard == []


# --- an answer that is lost ---


class Swallowing(BaseHTTPRequestHandler):
    """Takes the first ``losing`` uploads whole and goes away without a word; then the job is not ours."""

    protocol_version = "HTTP/1.1"
    losing: int
    taken: int

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).taken += 1
        if self.taken > self.losing:
            self.send_response(409)
            self.send_header("Content-Length", "0")
            self.end_headers()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(("losing", "outcome"), [(1, "unconfirmed"), (0, "refused")])
def test_courier_tells_a_lost_answer_from_a_refusal(
    outbox: OutboxPart, losing: int, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A 409 after an upload whose answer was lost is told and counted as a delivery that has probably
    arrived; without such a try it is the refusal that it says.
    """
    add(outbox, "a")
    handler = type("Handler", (Swallowing,), {"losing": losing, "taken": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with courier(outbox, f"http://127.0.0.1:{server.server_port}") as (_, told, _):
            told.await_count(1)
        server.shutdown()
    assert handler.taken == losing + 1
    ended = told.activity.snapshot()
    assert [(job.job_id, job.outcome) for job in ended.last_jobs] == [("a", outcome)]
    assert getattr(ended.uploads, outcome) == ended.jobs[outcome] == 1
    assert told.delivered == ["a"]
    assert told.unacceptable == []
    assert outbox.oldest() == []
    said = [record.message for record in caplog.records if record.levelname in {"WARNING", "ERROR"}][-1]
    assert said == ("result was probably delivered" if losing else "result refused for good and dropped")


def test_courier_knows_an_answer_lost_on_a_connection_that_was_there(outbox: OutboxPart) -> None:
    """An upload repeated at once, since the connection of the one before broke, counts the same."""

    class Breaking(Swallowing):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            type(self).taken += 1
            if self.taken == 2:
                self.close_connection = True  # the second is taken, and its answer lost
                return
            self.send_response(200 if self.taken == 1 else 409)
            self.send_header("Content-Length", "0")
            self.end_headers()

    handler = type("Handler", (Breaking,), {"taken": 0})
    add(outbox, "a")
    add(outbox, "b")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with courier(outbox, f"http://127.0.0.1:{server.server_port}") as (_, told, _):
            told.await_count(2)
        server.shutdown()
    uploads = told.activity.snapshot().uploads
    assert (uploads.delivered, uploads.unconfirmed, uploads.refused, uploads.retries) == (1, 1, 0, 0)


def test_courier_takes_a_gateways_error_for_a_lost_answer(outbox: OutboxPart) -> None:
    """Where a proxy before the studio says that it got no answer, the studio may have the picture too."""
    add(outbox, "a")
    with ScriptedHttp((504, {}, {}), (409, {}, {})) as server, courier(outbox, server.url) as (_, told, _):
        told.await_count(1)
    assert told.activity.snapshot().uploads.unconfirmed == 1


# --- a job offered again while its picture is here ---


def test_courier_offered_a_job_again_delivers_at_once(outbox: OutboxPart) -> None:
    """The studio asks for it: no backoff and no Retry-After keeps the picture back."""
    add(outbox, "a")
    with ScriptedHttp((429, {"Retry-After": "3600"}, {}), OK) as server:  # noqa: SIM117
        with courier(outbox, server.url) as (_, told, _):
            while not server.heard or told.uploads.under_way:
                told.give(0.01)
            told.uploads.offered_again("a")
            told.await_count(1)
    assert told.delivered == ["a"]
    assert told.uploads.has_just_delivered("a")
    assert not told.uploads.has_just_delivered("b")


def test_courier_keeps_a_picture_refused_while_it_was_offered_again(outbox: OutboxPart) -> None:
    """A 409 that crossed a new offer of the same job is old news: the picture stays, and is sent again."""
    add(outbox, "a")
    server = ScriptedHttp((409, {}, {}), OK)
    with server, courier(outbox, server.url, begins=False) as (_, told, thread):
        server.on_first = lambda: told.uploads.offered_again("a")
        thread.start()
        assert told.settled.get(timeout=LIMIT_S) == "a"
        told.uploads.offered_again("a")
        told.await_count(1)
    assert told.delivered == ["a"]
    assert len(server.heard) == 2


def test_courier_offered_a_job_whose_picture_is_gone_says_so(outbox: OutboxPart) -> None:
    """A picture refused the moment before its job came back is reported, so that the job is made anew."""
    with ScriptedHttp() as server, courier(outbox, server.url) as (_, told, _):
        told.uploads.offered_again("a")
        told.await_count(1)
    assert told.lost == [("a", "the studio refused its picture before")]


def test_courier_forgets_an_offer_of_a_picture_that_is_refused_for_good(outbox: OutboxPart) -> None:
    """An unacceptable picture is dropped once; its job, made anew, is not given up for the old offer."""
    add(outbox, "a")
    server = ScriptedHttp((422, {}, {}), OK)
    with server, courier(outbox, server.url, begins=False) as (_, told, thread):
        server.on_first = lambda: told.uploads.offered_again("a")
        thread.start()
        assert told.settled.get(timeout=LIMIT_S) == "a"
        add(outbox, "b")
        told.await_count(2)
    assert [job_id for job_id, _ in told.unacceptable] == ["a"]
    assert told.delivered == ["b"]
    assert told.lost == []


def test_courier_delivers_under_a_new_identity(outbox: OutboxPart, tmp_path: Path) -> None:
    """What a refused token kept back is sent, after a new registration, as the new worker."""
    add(outbox, "a")
    with ScriptedHttp((401, {}, {})) as server, courier(outbox, server.url):
        while not server.heard:
            threading.Event().wait(0.01)
    assert [d.job_id for d in Outbox(tmp_path / "outbox").oldest()] == ["a"]
    with ScriptedHttp(OK) as server:
        again = OutboxPart(Outbox(tmp_path / "outbox"), 1)
        with courier(again, server.url, worker_id="w2") as (_, told, _):
            told.await_count(1)
    assert server.heard[0].path.endswith("/workers/w2/jobs/a/complete")
