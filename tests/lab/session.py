"""A session on a thread of its own, and a box that has room for every offer."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio_worker.jobs import Job
from studio_worker.report.logs import ShippingBuffer
from studio_worker.spool.failures import Failures
from studio_worker.spool.outbox import Outbox
from studio_worker.spool.part import OutboxPart
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import Credentials
from studio_worker.studio.http.uploads import Uploads
from studio_worker.studio.session.aside import Aside
from studio_worker.studio.session.connection import Timings
from studio_worker.studio.session.connector import Connector
from studio_worker.studio.session.offers import (
    Judgement,
    Situation,
)
from studio_worker.studio.session.session import StudioSession
from studio_worker.studio.wire import Capabilities
from studio_worker.work.desk import Desk
from tests.fakes.scripted import LIMIT_S, ScriptedStudio
from tests.lab.frames import CAPABILITIES

IDLE = Situation(
    now=12.5,
    current_job_id=None,
    is_paused=False,
    threshold_gib=8.0,
    engines=frozenset({"sd-cpp", "synthetic"}),
    on_demand=True,
    allow_insecure_urls=False,
    is_uploading=lambda job_id: False,
    is_just_delivered=lambda job_id: False,
    is_in_outbox=lambda job_id: False,
    state_problem=lambda: None,
    is_poisoned=lambda job_id: False,
    failed_for_good=lambda job_id: None,
    is_on_box=lambda files: True,
    shortfall_bytes=lambda files: 0,
)


FAST = Timings(heartbeat_s=0.05, log_batch_s=0.05, backoff_base_s=0.01)


class Running:
    """A session on a thread of its own, with what it said of its state and how it ended.

    It is its own box, and hears the reports.
    """

    def __init__(self, studio: ScriptedStudio, *, timings: Timings = FAST, attempts: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="session-")
        folder = Path(self._folder.name)
        self.desk = Desk()
        self.shipping = ShippingBuffer()
        self.states: list[str] = []
        self.answers: list[Judgement] = []
        self.ended_with: BaseException | None = None
        self.outbox: set[str] = set()
        self.odd: dict[str, Any] = {}
        """What the situation has in the place of what it should."""
        self.uploads = Uploads(OutboxPart(Outbox(folder / "outbox"), 1))
        self.attempts = attempts
        self.session = StudioSession(self, self.desk, self.uploads, Failures(folder / "spool"), self)
        self._connector = Connector(StudioApi(studio.url), self, self.session, self.shipping, timings)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def capabilities(self) -> Capabilities:
        return CAPABILITIES.model_copy(update={"auto_enabled": not self.desk.is_paused})

    def situation(self) -> Situation:
        return replace(
            IDLE,
            current_job_id=self.desk.current_job_id,
            is_paused=self.desk.is_paused,
            is_in_outbox=self.outbox.__contains__,
            **self.odd,
        )

    def reconnect_attempts(self) -> int:
        return self.attempts

    def connected(self) -> None:
        self.states.append("connected")

    def reconnecting(self, why: str) -> None:
        self.states.append(f"reconnecting {why}")

    def offer_answered(self, judgement: Judgement, model: str) -> None:
        self.answers.append(judgement)

    def _run(self) -> None:
        try:
            self._connector.run(Credentials("w1", "token-of-w1"))
        except Exception as error:
            self.ended_with = error

    def taken(self) -> Job | None:
        """The next job; whoever waits here is never paused."""
        return self.desk.take(lambda: pytest.fail("told to rest"))

    def stop(self) -> None:
        self._connector.stop()

    def end(self) -> BaseException | None:
        """What the session ended with, once it has ended."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        self._folder.cleanup()
        return self.ended_with


class InlineSession(StudioSession):
    """The session without a loop: what other threads ask of it is done at once."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._aside = AtOnce(self._call)

    def _call(self, what: Callable[..., None], *args: object) -> bool:
        what(*args)
        return True


class AtOnce(Aside):
    """Offers are judged in the thread that hears them."""

    def do(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        then(work())
