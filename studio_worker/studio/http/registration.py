"""Becoming known to the studio: asked once, approved by a person.

A state machine over the identity file: every step is written before the next one is taken, so a crash
between any two of them leaves a state that the next start goes on from.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace

from studio_worker.errors import RefusedByStudio, StudioUnavailable, UnknownRegistration
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import Credentials, Identity, IdentityFile, Standing
from studio_worker.studio.http.transport import USER_AGENT
from studio_worker.studio.wire import Approved, Capabilities, RegisterRequest, Rejected

log = logging.getLogger(__name__)

TICK_S = 30.0
"""Between two polls, and between two failed requests (protocol: one 30 s tick for both)."""


class Registration:
    """From whatever state the identity file is in to credentials.

    Args:
        on_waiting: gets what is waited for, and what the operator has to do, whenever that changes.
        stop: ends the waiting.
        tick_s: seconds between polls.
    """

    def __init__(
        self,
        api: StudioApi,
        file: IdentityFile,
        capabilities: Callable[[], Capabilities],
        *,
        on_waiting: Callable[[str], None],
        stop: threading.Event,
        tick_s: float = TICK_S,
    ) -> None:
        self._api = api
        self._file = file
        self._capabilities = capabilities
        self._on_waiting = on_waiting
        self._stop = stop
        self._tick_s = tick_s
        self._is_announced = False
        self._told = ""

    def check(self) -> None:
        """Look at the identity alone. Raises ConfigError where it cannot be read or written."""
        self._file.load()

    def reset_command(self) -> str:
        """How an operator has this worker forgotten, and no other."""
        return self._file.reset_command()

    def run(self) -> Credentials | None:
        """Credentials, or ``None`` when stopped before there were any.

        Raises:
            RefusedByStudio: the registration was rejected, now or earlier.
            ConfigError: the identity cannot be read or written.
        """
        identity = self._file.load()
        while not self._stop.is_set():
            match identity.standing:
                case Standing.APPROVED:
                    return identity.credentials
                case Standing.REJECTED:
                    raise RefusedByStudio(
                        f"the studio rejected this worker's registration ({identity.rejected}); "
                        "to ask again: studio-worker register --reset"
                    )
                case Standing.PRISTINE | Standing.PENDING:
                    pass
            wait_s = self._tick_s
            try:
                if identity.standing is Standing.PRISTINE:
                    identity = self._with_secret(identity)
                    identity = self._ask(identity)
                    continue  # the first poll may come at once
                self._announce()
                identity = self._poll(identity)
                if identity.standing is not Standing.PENDING:
                    continue
            except UnknownRegistration as error:
                log.warning(
                    "registration request is unknown; asking anew",
                    extra={"op": "register", "error": str(error)},
                )
                identity = self._file.save(replace(identity, secret=None, request_id=None))
            except StudioUnavailable as error:
                wait_s = max(wait_s, error.retry_after_s or 0.0)
                facts = {"op": "register", "error": str(error), "retry_in_s": f"{wait_s:g}"}
                log.warning("registration has to wait", extra=facts)
                self._tell(f"registration has to wait: {error}")
            self._stop.wait(wait_s)
        return None

    def _announce(self) -> None:
        """Tell the operator, in the log once and in the status line, that approving is now up to them."""
        studio = self._api.root.removesuffix("/graphics/api")
        machine = self._capabilities().machine_name
        if not self._is_announced:
            self._is_announced = True
            facts = {"op": "register", "studio": studio, "machine": machine}
            log.info("waiting for approval at the studio", extra=facts)
        self._tell(
            f"waiting for approval: approve {machine} at {studio} (asked about every {self._tick_s:g} s)"
        )

    def _tell(self, line: str) -> None:
        if line != self._told:
            self._told = line
            self._on_waiting(line)

    def _with_secret(self, identity: Identity) -> Identity:
        """One secret for all tries of one request: the studio may have noted a try whose answer was lost."""
        if identity.secret:
            return identity
        return self._file.save(replace(identity, secret=secrets.token_hex(32)))

    def _ask(self, identity: Identity) -> Identity:
        assert identity.secret is not None
        answer = self._api.register(
            RegisterRequest(
                install_id=identity.install_id,
                registration_secret_hash=hashlib.sha256(identity.secret.encode("ascii")).hexdigest(),
                capabilities=self._capabilities(),
                user_agent=USER_AGENT,
            )
        )
        return self._file.save(replace(identity, request_id=answer.request_id))

    def _poll(self, identity: Identity) -> Identity:
        assert identity.request_id is not None
        assert identity.secret is not None
        decision = self._api.poll(identity.request_id, identity.secret)
        done = replace(identity, secret=None, request_id=None)
        if isinstance(decision, Approved):
            log.info("registration approved", extra={"op": "register", "worker_id": decision.worker_id})
            return self._file.save(
                replace(done, worker_id=decision.worker_id, auth_token=decision.auth_token)
            )
        if isinstance(decision, Rejected):
            return self._file.save(replace(done, rejected=decision.reason or "no reason given"))
        return identity
