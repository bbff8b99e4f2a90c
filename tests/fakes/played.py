"""The worker's neighbours, played by hand: an engine that ends pictures when a test says so, and no files."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from studio_worker.engine import Engine, Made, Request, StepProgress
from studio_worker.errors import DeviceError, JobError, JobImpossible
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import LocalFile, ModelFile
from studio_worker.spool.failures import Failures
from studio_worker.spool.in_hand import JobInHand
from studio_worker.spool.outbox import Outbox
from studio_worker.studio.http.uploads import Uploads
from studio_worker.studio.session.offers import Judgement, Situation
from studio_worker.studio.wire import Capabilities
from studio_worker.work.desk import Desk
from studio_worker.work.health import Health
from tests.fakes.scripted import LIMIT_S
from tests.lab.frames import CAPABILITIES


class Encoding:
    """A picture whose encoding does what the test says, and gives ``picture``."""

    def __init__(self, picture: Picture, act: Callable[[], object] = lambda: None) -> None:
        self._picture = picture
        self._act = act

    def encoded(self) -> Picture:
        self._act()
        return self._picture


class GatedEngine(Engine):
    """Begins a picture, and ends it when and how the test says."""

    def __init__(self) -> None:
        self.entered: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.cancel = Cancel()
        self.at_work = 0
        self.most_at_work = 0

    def make(self, request: Request, progress: StepProgress, cancel: Cancel) -> Made:
        self.cancel = cancel
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        self.entered.put(request.job_id)
        try:
            end = self.ends.get(timeout=LIMIT_S)
            cancel.check()
            if end == "picture":
                return Encoding(Picture(b"picture", "png", {"seed": 1}))
            if end == "bug":
                raise RuntimeError("a bug")
            if end == "lost":
                raise DeviceError("GPU lost; reboot")
            raise (JobError if end == "may pass" else JobImpossible)("it failed")
        finally:
            self.at_work -= 1


class NoFiles:
    """A store of models that have no files; ``error`` is raised instead where it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    @contextlib.contextmanager
    def taken(
        self, model: str, files: Iterable[ModelFile], **watching: Any
    ) -> Iterator[tuple[LocalFile, ...]]:
        if self._error is not None:
            raise self._error
        yield ()

    def is_as_registered(self, path: Path, progress: object, cancel: object) -> bool:
        return True


def untouched_health() -> Health:
    """What counts the ends of jobs where nobody asks for it."""
    over = threading.Event()
    over.set()  # so that no thread waits for a pause to end
    return Health(lambda text: None, try_device=lambda: "", end=lambda error: None, stop=over)


class PlayedBox:
    """What the session asks of a box, with room for everything; nobody is told anything."""

    def __init__(self, desk: Desk, uploads: Uploads, outbox: Outbox, in_hand: JobInHand, failures: Failures):
        self.desk = desk
        self.uploads = uploads
        self.outbox = outbox
        self.in_hand = in_hand
        self.failures = failures

    def capabilities(self) -> Capabilities:
        return CAPABILITIES.model_copy(update={"auto_enabled": not self.desk.is_paused})

    def reconnect_attempts(self) -> int:
        return 0

    def situation(self) -> Situation:
        """What offers are judged by."""
        return Situation(
            now=0.0,
            current_job_id=self.desk.current_job_id,
            is_paused=self.desk.is_paused,
            threshold_gib=8.0,
            engines=frozenset({"sd-cpp"}),
            on_demand=True,
            allow_insecure_urls=False,
            is_uploading=self.uploads.is_under_way,
            is_just_delivered=self.uploads.has_just_delivered,
            is_in_outbox=self.outbox.holds,
            state_problem=self.outbox.fullness,
            is_poisoned=self.in_hand.is_poisoned,
            failed_for_good=self.failures.final,
            is_on_box=lambda files: True,
            shortfall_bytes=lambda files: 0,
        )

    def registered(self, worker_id: str, *, is_given: bool = False) -> None: ...
    def connected(self) -> None: ...
    def reconnecting(self, why: str) -> None: ...
    def offer_answered(self, judgement: Judgement, model: str) -> None: ...
