"""Who this worker is to the studio: made once, approved by a person, kept on disk.

The identity file (0600) holds the install id, and either a pending request with its secret, or the
worker's id and token, or the rejection. Every step is written before the next one is taken, so a crash
between any two of them leaves a state that the next start goes on from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from studio_worker.errors import ConfigError, RefusedByStudio, StudioUnavailable, UnknownRegistration
from studio_worker.files import write_atomic
from studio_worker.logs import add_secret
from studio_worker.studio.api import USER_AGENT, StudioApi
from studio_worker.studio.wire import Approved, Capabilities, RegisterRequest, Rejected

log = logging.getLogger(__name__)

TICK_S = 30.0
"""Between two polls, and between two failed requests (protocol: one 30 s tick for both)."""


@dataclass(frozen=True)
class Identity:
    """What the identity file holds. Absent parts are ``None``."""

    install_id: str
    secret: str | None = None
    request_id: str | None = None
    worker_id: str | None = None
    auth_token: str | None = None
    rejected: str | None = None

    def describe(self) -> str:
        """One line for the operator, without secrets."""
        if self.worker_id and self.auth_token:
            return f"approved as worker {self.worker_id}"
        if self.rejected is not None:
            return f"rejected: {self.rejected}"
        if self.request_id is not None:
            return f"waiting for approval (request {self.request_id})"
        return f"not registered yet (install id {self.install_id})"


@dataclass(frozen=True)
class Credentials:
    """What a session and an upload need."""

    worker_id: str
    auth_token: str


class IdentityFile:
    """The identity on disk; made at first use."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Identity:
        """Raises ConfigError where the file cannot be read as what it should be."""
        try:
            identity = Identity(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            identity = Identity(install_id=str(uuid.uuid4()))
            self.save(identity)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "is not a readable identity",
                source=str(self._path),
                cure="restore it from a backup, or run `studio-worker register --reset` and approve anew",
            ) from error
        for secret in (identity.secret, identity.auth_token):
            if secret:
                add_secret(secret)
        return identity

    def save(self, identity: Identity) -> Identity:
        for secret in (identity.secret, identity.auth_token):
            if secret:
                add_secret(secret)
        text = json.dumps({k: v for k, v in asdict(identity).items() if v is not None}, indent=1)
        write_atomic(self._path, text.encode(), mode=0o600)
        return identity

    def reset(self) -> None:
        """Forget everything; the next start asks to be registered as a new worker."""
        self._path.unlink(missing_ok=True)


class Registration:
    """From whatever state the identity file is in to credentials.

    Args:
        on_waiting: called once the request is made, with the line that tells the operator what to do.
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

    def run(self) -> Credentials | None:
        """Credentials, or ``None`` when stopped before there were any.

        Raises:
            RefusedByStudio: the registration was rejected, now or earlier.
        """
        identity = self._file.load()
        announced = False
        while not self._stop.is_set():
            if identity.worker_id and identity.auth_token:
                return Credentials(identity.worker_id, identity.auth_token)
            if identity.rejected is not None:
                raise RefusedByStudio(
                    f"the studio rejected this worker's registration ({identity.rejected}); "
                    "to ask again: studio-worker register --reset"
                )
            wait_s = self._tick_s
            try:
                if identity.request_id is None:
                    identity = self._with_secret(identity)
                    identity = self._ask(identity)
                    continue  # the first poll may come at once
                if not announced:
                    self._announce()
                    announced = True
                identity = self._poll(identity)
                if identity.request_id is None:
                    continue
            except UnknownRegistration as error:
                log.warning("registration request is unknown; asking anew", extra=_facts(error=str(error)))
                identity = self._file.save(replace(identity, secret=None, request_id=None))
            except StudioUnavailable as error:
                log.warning("registration has to wait", extra=_facts(error=str(error)))
                wait_s = max(wait_s, error.retry_after_s or 0.0)
            self._stop.wait(wait_s)
        return None

    def _announce(self) -> None:
        """Tell the operator, in the log and in the status line, that approving is now up to them."""
        studio = self._api.root.removesuffix("/graphics/api")
        machine = self._capabilities().machine_name
        log.info("waiting for approval at the studio", extra=_facts(studio=studio, machine=machine))
        self._on_waiting(f"waiting for approval: approve {machine} at {studio}")

    def _with_secret(self, identity: Identity) -> Identity:
        """One secret for all tries of one request: the studio may have noted a try whose answer was lost."""
        if identity.secret is not None:
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
            log.info("registration approved", extra=_facts(worker_id=decision.worker_id))
            return self._file.save(
                replace(done, worker_id=decision.worker_id, auth_token=decision.auth_token)
            )
        if isinstance(decision, Rejected):
            return self._file.save(replace(done, rejected=decision.reason or "no reason given"))
        return identity


def _facts(**facts: str) -> dict[str, str]:
    return {"op": "register", **facts}
