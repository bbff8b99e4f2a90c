"""The studio as the service sees it: registration first, then session and courier, each on its own thread."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from studio_worker.context import called, carried
from studio_worker.errors import IdentityRefused, StudioWorkerError
from studio_worker.studio.http.courier import Courier
from studio_worker.studio.http.identity import RENEW_GIVEN, Credentials, given_credentials
from studio_worker.studio.http.registration import Registration
from studio_worker.studio.session.connector import Connector

log = logging.getLogger(__name__)

_LAST_DELIVERY_S = 30.0
"""How long a stop waits for the last upload; what is not delivered by then stays in the outbox."""


class RegistrationReports(Protocol):
    """Who is told that the studio has approved this worker."""

    def registered(self, worker_id: str, *, is_given: bool = False) -> None:
        """Args:
        is_given: by systemd credentials, with no registration.
        """
        ...


class StudioLink:
    """One studio, from registration to the last delivery.

    Args:
        on_end: called once where it is over for good, with what ended it.
        is_first: whether systemd's credentials are this one's; other lanes register.

    Raises:
        ConfigError: credentials or identity file cannot be used. Said now, not after hours of downloads.
    """

    def __init__(
        self,
        registration: Registration,
        connector: Connector,
        courier: Courier,
        reports: RegistrationReports,
        on_end: Callable[[StudioWorkerError], None],
        *,
        is_first: bool = True,
    ) -> None:
        self._registration = registration
        self._connector = connector
        self._courier = courier
        self._reports = reports
        self._on_end = on_end
        self._talking: threading.Thread | None = None
        self._delivering: threading.Thread | None = None
        self._given = given_credentials() if is_first else None
        if self._given is None:
            registration.check()

    def start(self) -> None:
        self._talking = _started("studio", carried(self._talk))

    def stop(self) -> None:
        """Deliver what can be delivered within a bounded time, then close the session and end the threads."""
        self._courier.stop()
        if self._delivering is not None:
            self._delivering.join(_LAST_DELIVERY_S)
        self._connector.stop()
        if self._talking is not None:
            self._talking.join(_LAST_DELIVERY_S)

    def _talk(self) -> None:
        deliver = carried(self._deliver)
        with contextlib.ExitStack() as named:
            try:
                credentials = self._given or self._registration.run()
                if credentials is not None:
                    named.enter_context(called(worker_id=credentials.worker_id))
                    self._reports.registered(credentials.worker_id, is_given=self._given is not None)
                    self._delivering = _started("courier", partial(deliver, credentials))
                    self._connector.run(credentials)
            except StudioWorkerError as error:
                if isinstance(error, IdentityRefused):
                    mends = self._registration.reset_command() if self._given is None else RENEW_GIVEN
                    error.reset_command = mends
                self._on_end(error)
            except Exception as error:
                log.exception("session crashed", extra={"op": "session"})
                self._on_end(StudioWorkerError(f"session crashed: {type(error).__name__}"))

    def _deliver(self, credentials: Credentials) -> None:
        try:
            self._courier.run(credentials)
        except Exception as error:  # a service that delivers nothing must not look healthy
            log.exception("courier crashed", extra={"op": "delivery"})
            self._on_end(StudioWorkerError(f"courier crashed: {type(error).__name__}"))


def _started(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
