"""The studio as the service sees it: registration first, then session and courier, each on its own thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal, Protocol

from studio_worker.errors import StudioWorkerError
from studio_worker.report.logs import ShippingBuffer
from studio_worker.spool.failures import Failures
from studio_worker.spool.outbox import Outbox
from studio_worker.studio.http import courier
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.courier import Courier, Patience
from studio_worker.studio.http.identity import Credentials, IdentityFile, given_credentials
from studio_worker.studio.http.registration import Registration
from studio_worker.studio.session.connection import Timings
from studio_worker.studio.session.offers import Judgement, Situation
from studio_worker.studio.session.session import StudioSession
from studio_worker.studio.wire import Capabilities
from studio_worker.work.desk import Desk

log = logging.getLogger(__name__)

_WHY_CHARS = 300
"""Of a reason in the status line; some of it may come from the studio."""
_LAST_DELIVERY_S = 30.0
"""How long a stop waits for the last upload; what is not delivered by then stays in the outbox."""


class Reports(courier.Reports, Protocol):
    """Who is told how registration, session and uploads go."""

    def registration(
        self,
        state: Literal["pending", "approved"],
        *,
        worker_id: str | None = None,
        detail: str | None = None,
    ) -> None: ...
    def session(self, state: Literal["connected", "reconnecting"]) -> None: ...


class StudioLink:
    """One studio, from registration to the last delivery. The worker takes its jobs from :attr:`session`.

    Args:
        situation: what offers are judged by; the courier knows what is being uploaded.
        on_answer: called with the judgement of every offer and the model it names.
        say: gets what the operator should read about the studio now, in a few words.
        on_end: called once where it is over for good, with what ended it.
        stop: ends the waiting for an approval.

    Raises:
        ConfigError: credentials or identity file cannot be used. Said now, not after hours of downloads.
    """

    def __init__(
        self,
        api: StudioApi,
        identity: IdentityFile,
        *,
        desk: Desk,
        outbox: Outbox,
        failures: Failures,
        situation: Callable[[Courier], Situation],
        capabilities: Callable[[], Capabilities],
        shipping: ShippingBuffer,
        reconnect_attempts: Callable[[], int],
        reports: Reports,
        on_answer: Callable[[Judgement, str], None],
        say: Callable[[str], None],
        on_end: Callable[[StudioWorkerError], None],
        stop: threading.Event,
        timings: Timings | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._reports = reports
        self._say = say
        self._on_end = on_end
        self._talking: threading.Thread | None = None
        self._delivering: threading.Thread | None = None
        self._given = given_credentials()
        if self._given is None:
            identity.load()
        self._registration = Registration(
            api, identity, capabilities, on_waiting=self._note_waiting, stop=stop
        )
        self.session = StudioSession(
            api=api,
            desk=desk,
            situation=lambda: situation(self.courier),
            capabilities=capabilities,
            uploading=lambda: self.courier.uploading,
            on_redelivery=lambda job_id: self.courier.offered_again(job_id),
            on_answer=on_answer,
            on_unreported=lambda job_id, error, retryable: failures.add(job_id, error, retryable=retryable),
            on_state=self._note_state,
            shipping=shipping,
            reconnect_attempts=reconnect_attempts,
            timings=timings,
        )
        self.courier = Courier(
            outbox,
            api,
            on_delivered=self.session.delivered,
            on_unacceptable=lambda job_id, error: self.session.report_failure(job_id, error, retryable=False),
            on_lost=self.session.lost,
            on_settled=self.session.settled,
            reports=reports,
            patience=patience or Patience(),
        )

    def start(self) -> None:
        self._talking = _started("studio", self._talk)

    def stop(self) -> None:
        """Deliver what can be delivered within a bounded time, then close the session and end the threads."""
        self.courier.stop()
        if self._delivering is not None:
            self._delivering.join(_LAST_DELIVERY_S)
        self.session.stop()
        if self._talking is not None:
            self._talking.join(_LAST_DELIVERY_S)

    def _talk(self) -> None:
        try:
            credentials = self._given or self._registration.run()
            if credentials is not None:
                self._reports.registration("approved", worker_id=credentials.worker_id)
                self._delivering = _started("courier", lambda: self._deliver(credentials))
                self.session.run(credentials)
        except StudioWorkerError as error:
            self._on_end(error)
        except Exception as error:
            log.exception("session crashed", extra={"op": "session"})
            self._on_end(StudioWorkerError(f"session crashed: {type(error).__name__}"))

    def _deliver(self, credentials: Credentials) -> None:
        try:
            self.courier.run(credentials)
        except Exception as error:  # a service that delivers nothing must not look healthy
            log.exception("courier crashed", extra={"op": "delivery"})
            self._on_end(StudioWorkerError(f"courier crashed: {type(error).__name__}"))

    def _note_waiting(self, detail: str) -> None:
        self._reports.registration("pending", detail=detail)
        self._say(detail)

    def _note_state(self, state: Literal["connected", "reconnecting"], why: str) -> None:
        self._reports.session(state)
        self._say(f"{state}: {why[:_WHY_CHARS]}" if why else state)
        if state == "connected":
            self.courier.hurry()


def _started(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
