"""Sequences of events that nobody would think of, against the real rules, desk, worker, outbox and courier.

Everything is real but the socket, the HTTP call of an upload, and the engine's work: connects, drops, offers,
duplicates, acknowledgements, errors, pauses, stops, kills, full disks and every end of a job and of an upload
come in any order, and after each the promises of a session are looked at. ``SEQUENCES=10000`` runs so many.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from studio_worker.engine import Engine, Router
from studio_worker.errors import DeliveryRefused, ProtocolError, RefusedByStudio, StudioUnavailable
from studio_worker.jobs import Job
from studio_worker.report.activity import Activity
from studio_worker.report.logs import ShippingBuffer
from studio_worker.spool import picture_files
from studio_worker.spool.delivery import Delivery
from studio_worker.spool.failures import Failures
from studio_worker.spool.in_hand import JobInHand
from studio_worker.spool.outbox import Outbox
from studio_worker.spool.part import OutboxPart
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.courier import Courier
from studio_worker.studio.http.identity import Credentials
from studio_worker.studio.http.uploads import Patience, Uploads
from studio_worker.studio.session.exchange import Exchange
from studio_worker.studio.session.offers import Judgement
from studio_worker.studio.session.protocol import SessionProtocol
from studio_worker.studio.session.shipping import Shipping
from studio_worker.studio.wire import Body
from studio_worker.work.desk import Desk
from studio_worker.work.ports import Ports
from studio_worker.work.worker import Worker
from tests.fakes.played import GatedEngine, NoFiles, PlayedBox, untouched_health
from tests.fakes.scripted import LIMIT_S
from tests.lab.frames import CLAIM
from tests.lab.session import InlineSession

CREDENTIALS = Credentials("w1", "token-of-w1")
JOBS = st.sampled_from(["j1", "j2", "j3", "j4"])
OFFERS = ["", "", "", "engine", "kind", "estimate", "task", "malformed"]
"""What is wrong with an offer; most are well."""
OTHER_FRAMES = [
    '{"type":"heartbeatAck"}',
    '{"type":"completeAck","jobId":"j1"}',
    '{"type":"failAck","jobId":"j2"}',
    '{"type":"fortune"}',
    '{"type":"offer","claim":{}}',
    '{"type":"offer","claim":{"jobId":7}}',
    "{",
    "[]",
    b"\x00",
]
UPLOADS: dict[str, Exception | None] = {
    "taken": None,
    "gone": DeliveryRefused(409),
    "unacceptable": DeliveryRefused(422),
    "token": RefusedByStudio("401"),
    "busy": StudioUnavailable("503", status=503),
    "broken": StudioUnavailable("500", status=500),
    "offline": StudioUnavailable("no network"),
    "unreadable": OSError(errno.EIO, "Input/output error"),
}
FOLDER = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
"""In memory where that can be had: thousands of sequences write tens of thousands of files."""


class TellingDesk(Desk):
    """Tells the test which job has ended."""

    def __init__(self, finished: queue.SimpleQueue[str]) -> None:
        super().__init__()
        self._finished = finished

    def finished(self, job: Job) -> None:
        super().finished(job)
        self._finished.put(job.job_id)


class NotingBox(PlayedBox):
    """Notes how offers were answered."""

    answers: list[str]

    def offer_answered(self, judgement: Judgement, model: str) -> None:
        self.answers.append(type(judgement).__name__)


class ScriptedApi(StudioApi):
    """Answers each upload as the test says, and lets it do something while the upload is under way."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9")
        self.answer = "taken"
        self.meanwhile: Callable[[str], None] = lambda job_id: None
        self.taken: list[str] = []
        self.refused: list[str] = []

    def upload(self, worker_id: str, token: str, delivery: Delivery) -> float:
        assert delivery.read() == b"picture"
        self.meanwhile(delivery.job_id)
        if error := UPLOADS[self.answer]:
            if isinstance(error, DeliveryRefused):
                self.refused.append(delivery.job_id)
            raise error
        self.taken.append(delivery.job_id)
        return 0.0


class Box:
    """One process: everything that a kill takes with it."""

    def __init__(self, folder: Path, api: ScriptedApi, log: list[str]) -> None:
        self.api = api
        self.in_hand = JobInHand(folder / "spool")
        self.failures = Failures(folder / "spool")
        self.outbox = Outbox(folder / "outbox", reserve_bytes=0)
        part = OutboxPart(self.outbox, 1)
        self.finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.desk = TellingDesk(self.finished)
        self.engine = GatedEngine()
        self.frames: list[dict[str, Any]] = []
        self.exchange: Exchange | None = None
        self.recovered = self.in_hand.recover()
        self.uploads = Uploads(part, Patience(0.0, 0.0, 0.0))
        box = NotingBox(self.desk, self.uploads, self.outbox, self.in_hand, self.failures)
        box.answers = log
        self.session = InlineSession(box, self.desk, self.uploads, self.failures, box)
        self.courier = Courier(api, part, self.uploads, self.session, Activity())

        def engine() -> Engine:
            return self.engine

        ports = Ports(
            source=self.desk,
            claims=self.session,
            files=NoFiles(),
            engines=Router({"sd-cpp": engine}),
            in_hand=self.in_hand,
            results=part,
            reports=Activity().lane(1),
            health=untouched_health(),
            fetch=lambda url, cancel: b"",
        )
        self.worker = Worker([ports], lambda: 60.0)
        self.thread = threading.Thread(target=self.worker.run, daemon=True)
        self.thread.start()

    def send(self, frame: Body) -> None:
        self.frames.append(json.loads(frame.to_json()))


class Sequences(RuleBasedStateMachine):
    """The studio, the operator, the engine, the disk and the power, each doing what it likes."""

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("studio_worker").setLevel(logging.CRITICAL + 1)
        self.folder = Path(tempfile.mkdtemp(prefix="sequences-", dir=FOLDER))
        self.disk_is_full = False
        self.judgements: list[str] = []
        self.read_frames = 0
        self.welcomed = False
        self.offered: list[str] = []  # offers of this connection without an answer yet
        self.held: set[str] = set()  # what the studio thinks this connection works on
        self.owed: set[str] = set()  # accepted, and neither delivered, failed, refused nor released
        self.running: str | None = None
        self._write = picture_files.write_atomic
        picture_files.write_atomic = self._maybe_full  # type: ignore[attr-defined]

    @initialize()
    def start(self) -> None:
        self.box = Box(self.folder, ScriptedApi(), self.judgements)

    def _maybe_full(self, path: Path, content: bytes, **more: Any) -> None:
        if self.disk_is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._write(path, content, **more)

    # --- connections ---

    @precondition(lambda self: self.box.exchange is None)
    @rule(is_welcome=st.sampled_from([True, True, True, False]))
    def connect(self, is_welcome: bool) -> None:
        self.box.exchange = Exchange(SessionProtocol(0.0), Shipping(ShippingBuffer()))
        self.box.session.begin(self.box.exchange, self.box.send, CREDENTIALS.auth_token)
        if is_welcome:
            self.welcome()

    @precondition(lambda self: self.box.exchange is not None and not self.welcomed)
    @rule()
    def welcome(self) -> None:
        self.welcomed = True
        self.hear(type="welcome", workerId="w1", serverTime="now")

    @precondition(lambda self: self.box.exchange is not None)
    @rule(code=st.sampled_from(["", "", "internal_error", "protocol_violation", "something_new"]))
    def drop(self, code: str) -> None:
        """The connection goes, with or without a word."""
        if code:
            with pytest.raises(ProtocolError):
                self.hear(type="error", code=code, message="m")
        self.box.exchange = None
        self.box.session.end()
        self.welcomed = False
        self.offered.clear()
        self.held.clear()

    @precondition(lambda self: self.box.exchange is not None)
    @rule(message=st.sampled_from(OTHER_FRAMES))
    def other_frame(self, message: str | bytes) -> None:
        said = len(self.box.frames)
        self.box.session.receive(message, 1.0)
        assert len(self.box.frames) == said, "there is nothing to say to this"

    @precondition(lambda self: self.box.exchange is not None)
    @rule()
    def beat(self) -> None:
        self.box.session.beat()

    # --- offers ---

    @precondition(lambda self: self.box.exchange is not None)
    @rule(
        job_id=JOBS, change=st.sampled_from(["", "", "", "engine", "kind", "estimate", "task", "malformed"])
    )
    def offer(self, job_id: str, change: str) -> None:
        """Of any job, held or not, and before welcome too: what crossed a delivery looks like this."""
        claim: dict[str, Any] = {**CLAIM, "jobId": job_id}
        match change:
            case "engine":
                claim["modelSource"] = {**CLAIM["modelSource"], "engine": "onnx"}
            case "kind":
                claim["task"] = {"kind": "llm"}
            case "estimate":
                claim["vramGbEstimate"] = 99
            case "task":
                del claim["task"]
            case "malformed":
                claim["task"] = {"kind": "image"}
        if self.welcomed:
            self.offered.append(job_id)
        is_ours = job_id == self.box.desk.current_job_id or self.box.outbox.holds(job_id)
        is_paused = self.box.desk.is_paused
        in_hand = self.box.desk.current_job_id
        at = len(self.box.frames)
        self.hear(type="offer", claim=claim)
        if not is_ours and any(frame["type"] == "accept" for frame in self.box.frames[at:]):
            assert not is_paused, "accepted while paused or draining"
            assert in_hand is None, "accepted beside a job in hand"
        self.let_job_begin()

    def let_job_begin(self) -> None:
        """A job that was accepted is on its way to the engine in a thread of its own: wait for it there."""
        if self.running is None and self.box.desk.current_job_id is not None:
            self.running = self.box.engine.entered.get(timeout=LIMIT_S)
            note = json.loads((self.folder / "spool" / "job-in-hand.json").read_text())
            assert note["job_id"] == self.running == self.box.desk.current_job_id, "it is not on disk"

    # --- the worker ---

    @precondition(lambda self: self.running is not None)
    @rule(end=st.sampled_from(["picture", "picture", "picture", "may pass", "for good", "bug"]))
    def job_ends(self, end: str) -> None:
        self.box.engine.ends.put(end)
        assert self.box.finished.get(timeout=LIMIT_S) == self.running
        self.running = None

    @precondition(lambda self: self.running is not None)
    @rule()
    def cancel(self) -> None:
        self.box.engine.cancel.set("a step took too long")

    # --- uploads ---

    @rule(answer=st.sampled_from(sorted(UPLOADS)), offered=st.booleans())
    def upload(self, answer: str, offered: bool) -> None:
        """A round of the courier; during it the studio may offer the very job that is under way."""

        crossed: list[dict[str, Any]] = []

        def meanwhile(job_id: str) -> None:
            if offered and self.welcomed:
                at = len(self.box.frames)
                self.offer(job_id, "")
                crossed.extend(self.box.frames[at:])

        taken, refused = len(self.box.api.taken), len(self.box.api.refused)
        self.box.api.answer, self.box.api.meanwhile = answer, meanwhile
        self.box.courier._round(CREDENTIALS)
        self.let_job_begin()
        assert crossed == [], "said before it was known whether the studio takes the picture"
        for job_id in self.box.api.taken[taken:]:
            assert not self.box.outbox.holds(job_id)
            self.settle(job_id)
        for job_id in self.box.api.refused[refused:]:
            if answer == "gone" and offered and self.welcomed:
                assert self.box.outbox.holds(job_id), "dropped while the studio asks for it"
            if not self.box.outbox.holds(job_id):
                self.settle(job_id)

    # --- the operator, the disk, the power ---

    @rule(wish=st.sampled_from(["pause", "resume", "resume", "resume", "stop", "stop at once"]))
    def operator(self, wish: str) -> None:
        match wish:
            case "pause":
                self.box.desk.pause()
            case "resume":
                self.box.desk.resume()
            case _:
                self.box.desk.close()
        if wish == "stop at once":
            self.box.worker.hand_back("the worker is stopping")

    @rule(full=st.sampled_from([True, False, False, False]))
    def disk(self, full: bool) -> None:
        self.disk_is_full = full

    @precondition(lambda self: not self.box.outbox.only_in_memory())
    @rule()
    def kill(self) -> None:
        """kill -9, and the next start: what is on disk is all there is."""
        if self.box.exchange is not None:
            self.drop("")
        in_hand = self.running
        remains = self.folder.with_name(self.folder.name + "-remains")
        shutil.copytree(self.folder, remains)
        self.leave()
        shutil.rmtree(self.folder)
        remains.rename(self.folder)
        self.disk_is_full = False
        self.box = Box(self.folder, ScriptedApi(), self.judgements)
        assert self.box.recovered == ([] if in_hand is None else [in_hand])
        if in_hand is not None:
            self.settle(in_hand)  # its claim went with the connection, and the crash is on record
            assert in_hand in json.loads((self.folder / "spool" / "crashes.json").read_text())
        self.read_frames = 0

    # --- what holds, always ---

    @invariant()
    def one_job_at_a_time(self) -> None:
        assert self.box.engine.most_at_work <= 1

    @invariant()
    def nothing_but_hello_before_welcome(self) -> None:
        if self.box.exchange is not None and not self.welcomed:
            assert self.box.frames[-1]["type"] == "hello"

    @invariant()
    def frames_are_what_the_studio_allows(self) -> None:
        self.read()

    @invariant()
    def every_accepted_job_is_somewhere(self) -> None:
        """In hand, in the outbox, delivered, refused or failed: exactly one of them, until it is over."""
        self.read()
        failures = self.folder / "spool" / "failures.json"
        recorded = set(json.loads(failures.read_text())) if failures.exists() else set()
        for job_id in list(self.owed):
            places = [
                job_id == self.box.desk.current_job_id,
                self.box.outbox.holds(job_id),
            ]
            assert sum(places) <= 1, f"{job_id} is in hand and finished at once"
            if not any(places):
                assert job_id in recorded, f"{job_id} was accepted and is nowhere"
                assert job_id not in self.held, f"the studio waits for {job_id} for ever"
                self.owed.discard(job_id)

    def read(self) -> None:
        """What the worker has said since the last look, as the studio understands it."""
        new, self.read_frames = self.box.frames[self.read_frames :], len(self.box.frames)
        for frame in new:
            job_id = frame.get("jobId")
            match frame["type"]:
                case "hello":
                    self.held.clear()
                case "accept":
                    assert job_id in self.offered, "accepted what was not offered: a protocol violation"
                    self.offered.remove(job_id)
                    self.held.add(job_id)
                    self.owed.add(job_id)
                case "reject":
                    assert job_id in self.offered
                    self.offered.remove(job_id)
                case "fail":
                    assert job_id in self.held, "failed what is not held: a protocol violation"
                    assert job_id != self.running, "failed a job that is being made"
                    self.held.discard(job_id)
                    self.offered = [offer for offer in self.offered if offer != job_id]  # one offered twice
                    assert not self.box.outbox.holds(job_id), "failed a job whose picture is there"
                    self.owed.discard(job_id)
                case "heartbeat":
                    assert frame["capabilities"]["autoEnabled"] in {True, False}
        if self.welcomed:
            waiting = [job_id for job_id in self.offered if job_id != self.box.uploads.under_way]
            assert waiting == [], "an offer without an answer"

    def settle(self, job_id: str) -> None:
        self.read()
        self.owed.discard(job_id)
        self.held.discard(job_id)

    def hear(self, **frame: Any) -> None:
        assert self.box.exchange is not None
        self.box.session.receive(json.dumps(frame), 1.0)

    def leave(self) -> None:
        """Let the worker's thread go; nothing it does now counts."""
        self.box.worker.hand_back("the test is over")
        self.box.desk.close()
        self.box.engine.ends.put("picture")
        self.box.thread.join(LIMIT_S)
        assert not self.box.thread.is_alive()
        self.running = None

    def teardown(self) -> None:
        try:
            if hasattr(self, "box"):
                self.leave()
        finally:
            picture_files.write_atomic = self._write  # type: ignore[attr-defined]
            logging.getLogger("studio_worker").setLevel(logging.NOTSET)
            shutil.rmtree(self.folder, ignore_errors=True)


TestSequences = Sequences.TestCase
TestSequences.__doc__ = "Any sequence of events keeps the promises of a session."
TestSequences.settings = settings(
    max_examples=int(os.environ.get("SEQUENCES", "60")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
