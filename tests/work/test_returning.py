"""What comes back: jobs over dropped connections, pictures after restarts, against a real local studio.

The studio, the session, the courier, the worker and the spool are real and joined as in the service; only
the engine is played by hand, so that a test says when a picture is finished.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.engine import Engine, Router
from studio_worker.errors import RefusedByStudio
from studio_worker.local_studio import Limits, LocalStudio
from studio_worker.report.activity import Activity
from studio_worker.report.logs import ShippingBuffer
from studio_worker.spool.failures import Failures
from studio_worker.spool.in_hand import JobInHand
from studio_worker.spool.outbox import Outbox
from studio_worker.spool.part import OutboxPart
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.courier import Courier
from studio_worker.studio.http.identity import Credentials, IdentityFile
from studio_worker.studio.http.registration import Registration
from studio_worker.studio.http.uploads import Patience, Uploads
from studio_worker.studio.link import StudioLink
from studio_worker.studio.session.connection import Timings
from studio_worker.studio.session.connector import Connector
from studio_worker.studio.session.session import StudioSession
from studio_worker.work.desk import Desk
from studio_worker.work.ports import Ports
from studio_worker.work.worker import Worker
from tests.fakes.played import GatedEngine, NoFiles, PlayedBox, untouched_health
from tests.fakes.scripted import LIMIT_S
from tests.lab.frames import CAPABILITIES

SOURCE = {"engine": "sd-cpp", "files": [], "cliDefaults": {}}
FAST = Timings(heartbeat_s=0.05, log_batch_s=0.05, backoff_base_s=0.05, backoff_cap_s=0.2)


class Box:
    """A worker without its process: started, and left as a crash would leave it."""

    def __init__(self, studio: LocalStudio, folder: Path) -> None:
        self.studio = studio
        self.engine = GatedEngine()
        self.outbox = Outbox(folder / "outbox", reserve_bytes=0)
        part = OutboxPart(self.outbox, 1)
        in_hand = JobInHand(folder / "spool")
        in_hand.recover()
        failures = Failures(folder / "spool")
        self.desk = Desk()
        self.ended_with: BaseException | None = None
        self.ended = threading.Event()
        self.uploads_wait = threading.Event()  # set: an upload waits for `let_upload`
        self.let_upload = threading.Event()
        box = self

        class Api(StudioApi):
            def upload(self, worker_id: str, token: str, delivery: Any) -> float:
                if box.uploads_wait.is_set():
                    box.let_upload.wait(LIMIT_S)
                return super().upload(worker_id, token, delivery)

        api = Api(studio.base_url)
        identity = IdentityFile(folder / "identity.json")
        self.credentials = self._registered(api, identity)
        self.uploads = Uploads(part, Patience(0.05, 0.2, 0.2))
        played = PlayedBox(self.desk, self.uploads, self.outbox, in_hand, failures)
        session = StudioSession(played, self.desk, self.uploads, failures, played)
        self.link = StudioLink(
            self._registration(api, identity),
            Connector(api, played, session, ShippingBuffer(), FAST),
            Courier(api, part, self.uploads, session, Activity()),
            played,
            self._note_end,
        )
        engine = self.engine

        def make() -> Engine:
            return engine

        ports = Ports(
            source=self.desk,
            claims=session,
            files=NoFiles(),
            engines=Router({"sd-cpp": make}),
            in_hand=in_hand,
            results=part,
            reports=Activity().lane(1),
            health=untouched_health(),
            fetch=lambda url, cancel: b"",
        )
        self.worker = Worker([ports], lambda: 60.0)
        self._working = threading.Thread(target=self.worker.run, daemon=True)
        self._working.start()
        self.link.start()

    def _registration(self, api: StudioApi, identity: IdentityFile) -> Registration:
        return Registration(
            api,
            identity,
            lambda: CAPABILITIES,
            on_waiting=lambda line: None,
            stop=threading.Event(),
            tick_s=0.0,
        )

    def _registered(self, api: StudioApi, identity: IdentityFile) -> Credentials:
        credentials = self._registration(api, identity).run()
        assert credentials is not None
        return credentials

    def _note_end(self, error: Exception) -> None:
        self.ended_with = error
        self.ended.set()

    def drop(self) -> None:
        """The connection goes, and is there again."""
        before = self.studio.attendance.live.get(self.credentials.worker_id)
        self.studio.attendance.end(self.credentials.worker_id, "internal_error")
        self.studio.wait_for(
            lambda: self.studio.attendance.live.get(self.credentials.worker_id) not in {None, before}, LIMIT_S
        )

    def leave(self) -> None:
        self.let_upload.set()
        self.worker.hand_back("the test is over")
        self.desk.close()
        self.engine.ends.put("picture")
        self._working.join(LIMIT_S)
        self.link.stop()
        assert not self._working.is_alive()


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    """A local studio that lets every worker in."""
    with LocalStudio(
        tmp_path / "studio.sqlite3", auto_approve=True, limits=Limits(max_attempts=9)
    ) as running:
        yield running


@contextlib.contextmanager
def box(studio: LocalStudio, folder: Path) -> Iterator[Box]:
    running = Box(studio, folder)
    try:
        yield running
    finally:
        running.leave()


def queue_job(studio: LocalStudio, **task: Any) -> str:
    return studio.queue_job(
        model="m", task={"kind": "image", "prompt": "a castle", **task}, model_source=SOURCE
    )


def await_done(studio: LocalStudio, *job_ids: str) -> None:
    studio.wait_for(lambda: all(studio.job(job_id).status == "done" for job_id in job_ids), LIMIT_S)


def test_job_goes_on_over_a_dropped_connection_and_is_delivered_once(
    studio: LocalStudio, tmp_path: Path
) -> None:
    """A connection that drops, twice, stops no job; its picture arrives after the reconnect, made once."""
    job_id = queue_job(studio)
    with box(studio, tmp_path) as running:
        assert running.engine.entered.get(timeout=LIMIT_S) == job_id
        running.drop()
        running.drop()
        assert running.engine.at_work == 1
        running.engine.ends.put("picture")
        await_done(studio, job_id)
        assert running.engine.entered.empty()
    job = studio.job(job_id)
    assert (job.completions, job.refused_uploads) == (1, 0)
    assert studio.result(job_id) == b"picture"


def test_job_offered_again_while_its_picture_waits_is_not_made_again(
    studio: LocalStudio, tmp_path: Path
) -> None:
    """A picture whose upload lingers over a drop and a new offer of its job is delivered, and made once."""
    job_id = queue_job(studio)
    with box(studio, tmp_path) as running:
        running.uploads_wait.set()
        assert running.engine.entered.get(timeout=LIMIT_S) == job_id
        running.engine.ends.put("picture")
        studio.wait_for(lambda: running.uploads.under_way == job_id, LIMIT_S)
        running.drop()
        running.let_upload.set()
        await_done(studio, job_id)
        after = queue_job(studio)
        assert running.engine.entered.get(timeout=LIMIT_S) == after
        running.engine.ends.put("picture")
        await_done(studio, after)
    assert studio.job(job_id).completions == 1


def test_failure_found_out_without_a_connection_is_told_when_the_job_comes_again(
    studio: LocalStudio, tmp_path: Path
) -> None:
    """A job that failed for good while nobody could be told is not tried again, also after a restart."""
    job_id = queue_job(studio)
    with box(studio, tmp_path) as running:
        assert running.engine.entered.get(timeout=LIMIT_S) == job_id
        running.drop()
        running.engine.ends.put("for good")
        studio.wait_for(lambda: studio.job(job_id).status == "failed", LIMIT_S)
        assert running.engine.entered.empty()
    assert studio.job(job_id).reason == "it failed"
    studio.retry(job_id)
    with box(studio, tmp_path):
        studio.wait_for(lambda: studio.job(job_id).status == "failed", LIMIT_S)


def test_picture_of_a_deleted_worker_waits_for_the_next_identity(studio: LocalStudio, tmp_path: Path) -> None:
    """A final close keeps what is finished; registered anew, the box does its work again."""
    job_id = queue_job(studio)
    with box(studio, tmp_path) as running:
        running.uploads_wait.set()
        assert running.engine.entered.get(timeout=LIMIT_S) == job_id
        running.engine.ends.put("picture")
        studio.wait_for(lambda: running.uploads.under_way == job_id, LIMIT_S)
        studio.delete_worker(running.credentials.worker_id)
        assert running.ended.wait(LIMIT_S)
        assert isinstance(running.ended_with, RefusedByStudio)
        assert "register --reset" in str(running.ended_with)
    assert Outbox(tmp_path / "outbox").holds(job_id)  # its upload was answered with 401
    IdentityFile(tmp_path / "identity.json").reset()
    with box(studio, tmp_path) as running:
        # It is the new worker's to deliver, or refused for good and made by the new worker.
        while studio.job(job_id).status != "done":
            with contextlib.suppress(queue.Empty):
                running.engine.entered.get(timeout=0.1)
                running.engine.ends.put("picture")
        studio.wait_for(lambda: not running.outbox.oldest(), LIMIT_S)
    assert studio.job(job_id).completions == 1


def test_job_that_crashed_twice_is_refused_and_the_studio_reads_why(
    studio: LocalStudio, tmp_path: Path
) -> None:
    """The third offer of a job that was in hand at two crashes is left to another worker, with the reason."""
    job_id = queue_job(studio)
    spool = tmp_path / "spool"
    for _ in range(2):
        with box(studio, tmp_path) as running:
            assert running.engine.entered.get(timeout=LIMIT_S) == job_id
            note = (spool / "job-in-hand.json").read_bytes()
        (spool / "job-in-hand.json").write_bytes(note)  # as a kill would have left it
    with box(studio, tmp_path) as running:
        studio.wait_for(lambda: bool(studio.job(job_id).rejections), LIMIT_S)
        assert running.engine.entered.empty()
    job = studio.job(job_id)
    assert job.status == "queued"
    reasons = [said.reason for said in job.rejections.values()]
    assert reasons == ["the worker crashed twice while it worked on this job"]
