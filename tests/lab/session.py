"""A session on a thread of its own, and a box that has room for every offer."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from studio_worker.jobs import Job
from studio_worker.report.logs import ShippingBuffer
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import Credentials
from studio_worker.studio.session.connection import Timings
from studio_worker.studio.session.offers import (
    Judgement,
    Situation,
)
from studio_worker.studio.session.session import StudioSession
from studio_worker.work.desk import Desk
from tests.lab.frames import CAPABILITIES
from tests.scripted import LIMIT_S, ScriptedStudio

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
    """A session on a thread of its own, with what it said of its state and how it ended."""

    def __init__(self, studio: ScriptedStudio, *, timings: Timings = FAST, attempts: int = 0) -> None:
        self.desk = Desk()
        self.shipping = ShippingBuffer()
        self.states: list[str] = []
        self.answers: list[Judgement] = []
        self.unreported: list[tuple[str, str, bool]] = []
        self.ended_with: BaseException | None = None
        self.outbox: set[str] = set()
        self.redelivered = threading.Event()
        self.odd: dict[str, Any] = {}
        """What the situation has in the place of what it should."""
        self.session = StudioSession(
            api=StudioApi(studio.url),
            desk=self.desk,
            situation=lambda: replace(
                IDLE,
                current_job_id=self.desk.current_job_id,
                is_paused=self.desk.is_paused,
                is_in_outbox=self.outbox.__contains__,
                **self.odd,
            ),
            capabilities=lambda: CAPABILITIES.model_copy(update={"auto_enabled": not self.desk.is_paused}),
            uploading=lambda: None,
            on_redelivery=lambda _job_id: self.redelivered.set(),
            on_answer=lambda judgement, model: self.answers.append(judgement),
            on_unreported=lambda job_id, error, retryable: self.unreported.append((job_id, error, retryable)),
            shipping=self.shipping,
            reconnect_attempts=lambda: attempts,
            timings=timings,
            on_state=lambda state, why: self.states.append(f"{state} {why}".strip()),
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.session.run(Credentials("w1", "token-of-w1"))
        except Exception as error:
            self.ended_with = error

    def taken(self) -> Job | None:
        """The next job; whoever waits here is never paused."""
        return self.session.take(lambda: pytest.fail("told to rest"))

    def end(self) -> BaseException | None:
        """What the session ended with, once it has ended."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return self.ended_with
