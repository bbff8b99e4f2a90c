"""Sequences of events that nobody would think of, over three lanes: one device, and every job in one lane.

Connections that drop, pauses, kills, stop signals, a lost device and lanes that end come in any order.
Desks, lanes, outbox, sessions and couriers are real; played are the sockets, the uploads, the engine's work,
and a studio that gives jobs to its three workers. ``SEQUENCES=10000`` runs so many. Which of several lanes
comes to the device first is theirs to settle, so one seed may go several ways.
"""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio_worker.engine import Router
from studio_worker.errors import DeliveryRefused, DeviceError, StudioUnavailable
from studio_worker.jobs import Job
from studio_worker.report.activity import Activity
from studio_worker.report.logs import ShippingBuffer
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
from studio_worker.studio.session.offers import Situation
from studio_worker.studio.session.protocol import SessionProtocol
from studio_worker.studio.session.shipping import Shipping
from studio_worker.studio.wire import Body
from studio_worker.work.desk import Desk, Hands
from studio_worker.work.ports import Ports
from studio_worker.work.worker import Worker
from tests.fakes.played import GatedEngine, NoFiles, PlayedBox, untouched_health
from tests.fakes.scripted import LIMIT_S
from tests.lab.frames import CLAIM
from tests.lab.session import InlineSession

LANES = (1, 2, 3)
JOBS = [f"j{number}" for number in range(4)]
ROUNDS = 40
"""So many more than it takes to make all jobs, when nothing more goes wrong."""
EVENTS = 60
FOLDER = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


class Studio(StudioApi):
    """Whose job is whose, and what has arrived. A worker here is called by its lane's number."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9")
        self.claims: dict[str, int] = {}
        self.dropped_by: dict[str, int] = {}
        self.done: list[str] = []
        self.is_reached = True

    def queued(self) -> list[str]:
        return [job_id for job_id in JOBS if job_id not in self.done and job_id not in self.claims]

    def release(self, lane: int) -> None:
        for job_id in [job_id for job_id, holder in self.claims.items() if holder == lane]:
            del self.claims[job_id]
            self.dropped_by[job_id] = lane

    def upload(self, worker_id: str, token: str, delivery: Delivery) -> float:
        if not self.is_reached:
            raise StudioUnavailable("no network")
        job_id, lane = delivery.job_id, int(worker_id)
        holder = self.claims.get(job_id, self.dropped_by.get(job_id))
        if job_id in self.done or holder != lane:
            raise DeliveryRefused(409)
        self.claims.pop(job_id, None)
        self.done.append(job_id)
        return 0.0


class TellingDesk(Desk):
    """Tells the test which job has ended, and counts those that were taken and that have ended."""

    def __init__(self, hands: Hands, finished: queue.SimpleQueue[str]) -> None:
        super().__init__(hands)
        self._finished = finished
        self.taken = self.ended = 0

    def put(self, job: Job) -> bool:
        is_here = super().put(job)
        self.taken += is_here
        return is_here

    def finished(self, job: Job) -> None:
        super().finished(job)
        self.ended += 1
        self._finished.put(job.job_id)


class LaneBox(PlayedBox):
    """One lane's box, which knows of the others."""

    lanes: list[Lane]

    def situation(self) -> Situation:
        others = [lane for lane in self.lanes if lane.desk is not self.desk]

        def is_elsewhere(job_id: str) -> bool:
            return any(
                lane.desk.current_job_id == job_id or lane.uploads.is_under_way(job_id) for lane in others
            )

        return replace(super().situation(), is_elsewhere=is_elsewhere)


class Lane:
    """One lane as the service has it."""

    def __init__(self, number: int, box: Process, hands: Hands, studio: Studio) -> None:
        self.number = number
        self.desk = TellingDesk(hands, box.finished)
        self.part = OutboxPart(box.outbox, number)
        self.uploads = Uploads(self.part, Patience(0.0, 0.0, 0.0))
        played = LaneBox(self.desk, self.uploads, box.outbox, box.in_hand, box.failures)
        played.lanes = box.lanes
        self.session = InlineSession(played, self.desk, self.uploads, box.failures, played)
        self.courier = Courier(studio, self.part, self.uploads, self.session, Activity())
        self.is_connected = self.has_ended = False
        self.frames: list[dict[str, Any]] = []

    def send(self, frame: Body) -> None:
        self.frames.append(json.loads(frame.to_json()))

    def hear(self, **frame: Any) -> None:
        self.session.receive(json.dumps(frame), 1.0)


class Process:
    """All that a kill takes with it."""

    def __init__(self, folder: Path, studio: Studio) -> None:
        self.in_hand = JobInHand(folder / "spool")
        self.in_hand.recover()
        self.failures = Failures(folder / "spool")
        self.outbox = Outbox(folder / "outbox", reserve_bytes=0)
        self.outbox.lanes.update(LANES)
        self.finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.engine = GatedEngine()
        self._at_device: str | None = None
        self.lanes: list[Lane] = []
        hands = Hands()
        for number in LANES:
            self.lanes.append(Lane(number, self, hands, studio))
        engines = Router({"sd-cpp": lambda: self.engine})
        self.worker = Worker([self._ports(lane, engines) for lane in self.lanes], lambda: 60.0)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.error = error

    def _ports(self, lane: Lane, engines: Router) -> Ports:
        return Ports(
            source=lane.desk,
            claims=lane.session,
            files=NoFiles(),
            engines=engines,
            in_hand=self.in_hand.of_lane(lane.number),
            results=lane.part,
            reports=Activity().lane(lane.number),
            health=untouched_health(),
            fetch=lambda url, cancel: b"",
        )

    @property
    def is_idle(self) -> bool:
        return all(lane.desk.is_idle() for lane in self.lanes)

    def at_device(self) -> str:
        """The job that has the device, where a lane has one; which, they have settled between them."""
        if self._at_device is None:
            self._at_device = self.engine.entered.get(timeout=LIMIT_S)
        return self._at_device

    def end_job(self, end: str) -> str:
        """Have the job at the device end so."""
        job_id = self.at_device()
        self.engine.ends.put(end)
        self._at_device = None
        return job_id

    def leave(self) -> None:
        """Hand all back and end."""
        self.worker.hand_back("the test is over")
        for lane in self.lanes:
            lane.desk.close()
            self.engine.ends.put("picture")
        self.ended()

    def ended(self) -> None:
        """All of it has come to its end, and every job that was taken."""
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()
        assert [lane.desk.taken for lane in self.lanes] == [lane.desk.ended for lane in self.lanes]


class Scene:
    """The studio, the network, the engine and the power, each doing what it likes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lanes-", dir=FOLDER))
        self.studio = Studio()
        self.pictures: list[str] = []
        self.start()

    def start(self) -> None:
        self.box = Process(self.folder, self.studio)
        for number in LANES:
            self.connect(number)

    def lane(self, number: int) -> Lane:
        return self.box.lanes[number - 1]

    # --- the studio and the network ---

    def connect(self, number: int) -> None:
        lane = self.lane(number)
        if lane.is_connected or lane.has_ended:
            return
        lane.is_connected = True
        exchange = Exchange(SessionProtocol(0.0), Shipping(ShippingBuffer()))
        lane.session.begin(exchange, lane.send, "token")
        lane.hear(type="welcome", workerId=str(number), serverTime="now")

    def drop(self, number: int, returns: bool) -> None:
        """A connection goes, and what the studio thinks that its lane has; it may be there again at once."""
        lane = self.lane(number)
        if lane.is_connected:
            lane.is_connected = False
            lane.session.end()
            self.studio.release(number)
        if returns:
            self.connect(number)

    def offer(self, first: int, place: int) -> None:
        """Any job that nobody holds, to a lane that holds none."""
        in_turn = [*range(first, len(LANES) + 1), *range(1, first)]
        self.offer_to([each for each in in_turn if self.lane(each).is_connected], place)

    def offer_to(self, lanes: list[int], place: int) -> None:
        free = [
            number
            for number in lanes
            if self.lane(number).is_connected and number not in self.studio.claims.values()
        ]
        queued = self.studio.queued()
        if not free or not queued:
            return
        number, job_id = free[0], queued[place % len(queued)]
        lane = self.lane(number)
        lane.frames.clear()
        self.studio.claims[job_id] = number
        lane.hear(type="offer", claim={**CLAIM, "jobId": job_id})
        self.read(lane)

    def read(self, lane: Lane) -> None:
        for frame in lane.frames:
            job_id = frame.get("jobId")
            if frame["type"] in {"reject", "fail"} and self.studio.claims.get(job_id) == lane.number:
                del self.studio.claims[job_id]
        lane.frames.clear()

    def deliver(self, number: int, is_reached: bool) -> None:
        lane = self.lane(number)
        if lane.has_ended:
            return
        self.studio.is_reached = is_reached
        lane.courier._round(Credentials(str(number), "token"))
        self.studio.is_reached = True
        self.read(lane)

    # --- the engine and the power ---

    def job_ends(self, end: str) -> None:
        """The job at the device ends, if there is one."""
        if self.box.is_idle:
            return
        job_id = self.box.end_job(end)
        if end == "picture":
            self.pictures.append(job_id)
        assert self.box.finished.get(timeout=LIMIT_S) == job_id
        self.read_all()

    def read_all(self) -> None:
        for lane in self.box.lanes:
            self.read(lane)

    def kill(self) -> None:
        """kill -9, and the next start: what is on disk is all there is."""
        for number in LANES:
            self.drop(number, returns=False)
        remains = self.folder.with_name(self.folder.name + "-remains")
        shutil.copytree(self.folder, remains)
        self.box.leave()
        shutil.rmtree(self.folder)
        remains.rename(self.folder)
        self.start_again()

    def start_again(self) -> None:
        for number in LANES:
            self.drop(number, returns=False)
        shutil.rmtree(self.folder / "spool")  # crashes are others' tests; here no job is given up for them
        self.start()

    def notes(self) -> list[str]:
        """The jobs that are noted as in hand."""
        found = (self.folder / "spool").glob("job-in-hand*.json")
        return sorted(json.loads(note.read_text())["job_id"] for note in found)

    # --- the operator, and the end ---

    def pause(self, is_over: bool) -> None:
        for lane in self.box.lanes:
            lane.desk.resume() if is_over else lane.desk.pause()

    def stop(self, is_second: bool, is_reached: bool) -> None:
        """A stop signal: what is in hand is made, and each lane delivers once more. At the second it is
        handed back, wherever it is.
        """
        for lane in self.box.lanes:
            lane.desk.close()
        if is_second:
            self.box.leave()
            self.read_all()
        while not self.box.is_idle:
            self.job_ends("picture")
        self.box.ended()
        assert self.notes() == []
        for number in LANES:
            self.deliver(number, is_reached)
        self.start_again()

    def lose_device(self) -> None:
        """The job at the device is reported and stays noted, for the next start to count; all others are
        handed back.
        """
        if self.box.is_idle:
            return
        job_id = self.box.end_job("lost")
        self.box.ended()
        assert isinstance(self.box.error, DeviceError)
        assert self.notes() == [job_id]
        self.read_all()
        assert not set(self.studio.claims) & {job_id}
        self.start_again()

    def end_lane(self, number: int) -> None:
        """The studio deletes a lane's worker: its job is handed back, and its pictures wait for another lane.
        The last one's end is the service's; the operator has all of them approved anew.
        """
        lane = self.lane(number)
        if sum(not each.has_ended for each in self.box.lanes) == 1:
            self.stop(True, False)
            return
        if lane.has_ended:
            return
        job_id = lane.desk.current_job_id
        has_device = job_id is not None and self.box.at_device() == job_id
        self.drop(number, returns=False)
        lane.has_ended = True
        self.box.worker.leave(number, "deleted at the studio")
        self.box.outbox.lanes.discard(number)
        if has_device:
            self.box.end_job("picture")
        if job_id is not None:
            assert self.box.finished.get(timeout=LIMIT_S) == job_id
        lane.frames.clear()

    # --- what holds, always ---

    def one_job_is_at_the_device(self) -> None:
        assert self.box.engine.most_at_work <= 1

    def no_job_is_on_two_lanes(self) -> None:
        in_hand = [lane.desk.current_job_id for lane in self.box.lanes if not lane.desk.is_idle()]
        assert len(in_hand) == len(set(in_hand))
        waiting = [delivery.job_id for delivery in self.box.outbox.oldest()]
        assert len(waiting) == len(set(waiting))
        assert not set(waiting) & set(in_hand), "it is made again while its picture waits"

    def nothing_is_made_or_arrives_twice(self) -> None:
        """A picture that is finished is delivered, by whichever lane is asked for it, and not made again."""
        assert len(self.studio.done) == len(set(self.studio.done))
        assert len(self.pictures) == len(set(self.pictures))

    def finish(self) -> None:
        """When nothing goes wrong any more, every job is made: none was lost, and no lane is stuck."""
        self.pause(is_over=True)
        for number in LANES:
            self.connect(number)
        for round_ in range(ROUNDS):
            for number in LANES:
                self.offer_to([number], round_)
                self.job_ends("picture")
                for each in LANES:
                    self.deliver(each, True)
        assert sorted(self.studio.done) == JOBS

    def leave(self) -> None:
        self.box.leave()
        shutil.rmtree(self.folder, ignore_errors=True)


def play(scene: Scene, chance: random.Random) -> None:
    """One event after the other."""
    for _ in range(EVENTS):
        lane = chance.choice(LANES)
        match chance.choice(
            [*["offer"] * 5, *["ends"] * 5, "deliver", "deliver", "drop", "drop", "rare", "pause"]
        ):
            case "offer":
                scene.offer(lane, chance.randrange(len(JOBS)))
            case "ends":
                scene.job_ends(chance.choice(["picture", "picture", "may pass"]))
            case "deliver":
                scene.deliver(lane, chance.random() < 0.7)
            case "drop":
                scene.drop(lane, chance.random() < 0.5)
            case "pause":
                scene.pause(is_over=chance.random() < 0.7)
            case "rare":
                _rare(scene, lane, chance)
        scene.one_job_is_at_the_device()
        scene.no_job_is_on_two_lanes()
        scene.nothing_is_made_or_arrives_twice()


def _rare(scene: Scene, lane: int, chance: random.Random) -> None:
    """What ends a process, or a lane."""
    match chance.choice(["kill", "stop", "hand back", "lose device", "end lane", "end lane"]):
        case "kill":
            scene.kill()
        case "stop":
            scene.stop(is_second=False, is_reached=chance.random() < 0.5)
        case "hand back":
            scene.stop(is_second=True, is_reached=chance.random() < 0.5)
        case "lose device":
            scene.lose_device()
        case "end lane":
            scene.end_lane(lane)


@pytest.mark.parametrize("seed", range(int(os.environ.get("SEQUENCES", "12"))))
def test_whatever_happens_every_job_is_made_once(seed: int) -> None:
    """Any sequence of events over several lanes makes every job, one at a time, and none of them twice."""
    scene = Scene()
    try:
        play(scene, random.Random(seed))
        scene.finish()
    finally:
        scene.leave()
