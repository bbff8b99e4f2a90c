"""Who this worker is to the studio, as it lies on disk (0600) or comes from systemd.

The identity file holds the install id, and either a pending request with its secret, or the worker's id and
token, or the rejection. Which of these it is, is its standing. It is written as a whole or not at all.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.files import DISK_TROUBLES, write_atomic
from studio_worker.report.logs import add_secret
from studio_worker.wording import register_command

log = logging.getLogger(__name__)

WORKER_ID_CREDENTIAL = "studio-worker.worker-id"
AUTH_TOKEN_CREDENTIAL = "studio-worker.auth-token"
"""Names of systemd credentials (LoadCredential=, systemd.exec(5)) that replace the registration."""

RENEW_GIVEN = (
    f"give it an approved worker's id and token as {WORKER_ID_CREDENTIAL} and {AUTH_TOKEN_CREDENTIAL}"
)
"""What helps a worker of which the studio takes no more what it was given so: it has no identity to reset."""

_VISIBLE = re.compile(r"[!-~]+")


def identity_name(lane: int) -> str:
    """How a lane's identity file is called; the first lane's as that of a service without lanes."""
    return "identity.json" if lane == 1 else f"identity-{lane}.json"


def lane_identities(folder: Path) -> list[Path]:
    """The identity files there of lanes beyond the first, also of those that do not run any more."""
    return sorted(folder.glob("identity-*.json"), key=lambda path: (len(path.name), path.name))


def lane_of(path: Path) -> int:
    """Whose identity file it is."""
    number = path.stem.removeprefix("identity").removeprefix("-")
    return int(number) if number.isdecimal() else 1


def reset_command(path: Path) -> str:
    """How an operator has this identity forgotten, and that of no other lane."""
    lane = lane_of(path)
    is_alone = lane == 1 and not lane_identities(path.parent)
    return register_command(path.parent, "--reset" if is_alone else f"--reset --lane {lane}")


class Standing(enum.Enum):
    """Where a worker stands with the studio."""

    PRISTINE = "pristine"
    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Credentials:
    """What a session and an upload need."""

    worker_id: str
    auth_token: str


@dataclass(frozen=True)
class Identity:
    """What the identity file holds. Absent parts are ``None``."""

    install_id: str
    secret: str | None = None
    request_id: str | None = None
    worker_id: str | None = None
    auth_token: str | None = None
    rejected: str | None = None
    machine: str | None = None

    @property
    def standing(self) -> Standing:
        """A part that lacks its other half (a request without its secret) counts as absent."""
        if self.credentials is not None:
            return Standing.APPROVED
        if self.rejected is not None:
            return Standing.REJECTED
        return Standing.PENDING if self.request_id and self.secret else Standing.PRISTINE

    @property
    def credentials(self) -> Credentials | None:
        if self.worker_id and self.auth_token:
            return Credentials(self.worker_id, self.auth_token)
        return None

    def describe(self) -> str:
        """One line for the operator, without secrets."""
        match self.standing:
            case Standing.APPROVED:
                return f"approved as worker {self.worker_id}"
            case Standing.REJECTED:
                return f"rejected: {self.rejected}"
            case Standing.PENDING:
                return f"waiting for approval (request {self.request_id})"
            case Standing.PRISTINE:
                return f"not registered yet (install id {self.install_id})"


_IDENTITY = TypeAdapter(Identity)


class IdentityFile:
    """The identity on disk; made at first use.

    Args:
        machine: the mark of this machine, which a new identity gets; ``None`` where it has none.
    """

    def __init__(self, path: Path, machine: str | None = None) -> None:
        self._path = path
        self._machine = machine

    def load(self) -> Identity:
        """What the file holds; a new identity where there is none.

        Raises:
            ConfigError: it cannot be read as what it should be, or a new one cannot be written.
        """
        return self.found() or self.save(Identity(str(uuid.uuid4()), machine=self._machine))

    def found(self) -> Identity | None:
        """What the file holds, fields of later versions ignored; ``None`` where there is none.

        Raises:
            ConfigError: it cannot be read as what it should be.
        """
        try:
            identity = _IDENTITY.validate_json(self._path.read_text())
            self._hide()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._problem(
                f"cannot be read: {error.strerror}", "give the service's user access to it"
            ) from error
        except (ValidationError, ValueError) as error:  # without its text, which quotes the content
            raise self._problem("is not a readable identity", self._restore()) from (
                None if isinstance(error, ValidationError) else error
            )
        if identity.auth_token is not None and not _VISIBLE.fullmatch(identity.auth_token):
            raise self._problem("holds a token that no request can carry", self._restore())
        _redact(identity)
        return identity

    def save(self, identity: Identity) -> Identity:
        """Write it; on disk for good when this returns. Raises ConfigError, StateUnavailable."""
        _redact(identity)
        text = json.dumps({k: v for k, v in asdict(identity).items() if v is not None}, indent=1)
        try:
            write_atomic(self._path, text.encode(), mode=0o600)
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
            if error.errno in DISK_TROUBLES:  # the next start may not meet it; it goes on from what is there
                raise StateUnavailable(
                    problem, source=str(self._path), cure="make room on its disk"
                ) from error
            raise self._problem(problem, "give the service's user access to its folder") from error
        return identity

    def reset_command(self) -> str:
        """As the function of this name."""
        return reset_command(self._path)

    def reset(self) -> None:
        """Forget everything; the next start asks to be registered as a new worker."""
        self._path.unlink(missing_ok=True)

    def _restore(self) -> str:
        return f"restore it from a backup, or run `{self.reset_command()}` and approve anew"

    def _hide(self) -> None:
        """A file that came back from a backup for everybody to read is closed again."""
        mode = self._path.stat().st_mode
        if mode & 0o077:
            log.warning("identity was readable by others", extra={"op": "register", "path": str(self._path)})
            self._path.chmod(mode & 0o700)

    def _problem(self, problem: str, cure: str) -> ConfigError:
        return ConfigError(problem, source=str(self._path), cure=cure)


def given_credentials() -> Credentials | None:
    """Worker id and token from systemd credentials; ``None`` where there are none.

    Raises:
        ConfigError: only one of the two is there, or it is empty or no header could carry it.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return None
    names = (WORKER_ID_CREDENTIAL, AUTH_TOKEN_CREDENTIAL)
    found = {name: path for name in names if (path := Path(folder, name)).exists()}
    if not found:
        return None
    values = []
    for name in names:
        try:
            value = found[name].read_text("ascii").strip() if name in found else ""
        except (OSError, ValueError):
            value = ""
        if not _VISIBLE.fullmatch(value):
            raise ConfigError(
                "is empty or no single word" if name in found else "is missing beside the other one",
                source=f"systemd credential {name}",
                cure=f"give both {WORKER_ID_CREDENTIAL} and {AUTH_TOKEN_CREDENTIAL}, or neither to register",
            )
        values.append(value)
    add_secret(values[1])
    return Credentials(*values)


def _redact(identity: Identity) -> None:
    for secret in (identity.secret, identity.auth_token):
        if secret:
            add_secret(secret)
