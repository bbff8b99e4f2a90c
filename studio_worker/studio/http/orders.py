"""What a person's script asks of a studio of one's own: queue a job, see how it stands, fetch its picture.

Calls the local studio's ``/api``; one attempt each. What it answers is checked before it names a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from studio_worker.errors import ConfigError, OrderRefused, RefusedByStudio, StudioUnavailable
from studio_worker.network.urls import safe_url
from studio_worker.studio.http.transport import Answer, Transport

_RESULT_LIMIT_BYTES = 128 << 20
"""A local studio takes results of 100 MiB."""

_JOB_ID = re.compile(r"[0-9A-Za-z_-]{1,200}")
_SCHEME = re.compile(r"\Ahttps?:/*", re.IGNORECASE)
"""At the beginning, however many slashes it has."""
_EXT = re.compile(r"[a-z0-9]{1,8}")


@dataclass(frozen=True)
class Order:
    """How a queued job stands. ``ext`` is its result's, ``reason`` why it failed or waits."""

    job_id: str
    status: str
    ext: str = ""
    reason: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more unless a person asks for it."""
        return self.status in ("done", "failed")


class Orders:
    """The orders of one person at one studio.

    Args:
        address: the studio's, as its page has it.
        token: what people must know there, if anything.
        token_source: where it comes from, for people.

    Raises:
        ConfigError: it is no http address, or the environment's proxy or certificates cannot be used.
    """

    def __init__(self, address: str, token: str = "", token_source: str = "") -> None:
        root = _root(address)
        self.address = safe_url(root)
        self._token = token
        self._token_source = token_source
        self._is_known = False
        self._transport = Transport(root, _RESULT_LIMIT_BYTES)

    def queue(self, job: Mapping[str, Any]) -> Order:
        """Queue a job; ``job`` is the body of ``POST /api/jobs``. One with a ``jobId`` may be sent again.

        Raises:
            OrderRefused: the studio says what is wrong with it.
            RefusedByStudio: it wants another token.
            ConfigError: what answers is no local studio.
            StudioUnavailable: no answer came, or a passing error; ``is_answer_lost`` says whether the job may
                be queued all the same.
        """
        answer = self._send("POST", "/api/jobs", json.dumps(job, allow_nan=False).encode())
        job_id = "" if _is_anothers(answer) else _id_in(_facts(self._checked(answer)) or {})
        if not job_id:  # where a studio was just now another answers for a moment in its place
            raise self._strange() if self._is_known else self._no_studio()
        self._is_known = True
        return Order(job_id, "queued")

    def see(self, job_id: str) -> Order:
        """How it stands. Raises as :meth:`queue` does, but where another answers for now in its place."""
        facts = _facts(self._checked(self._send("GET", f"/api/jobs/{job_id}"))) or {}
        result = facts.get("result")
        ext = str(result.get("ext", "")) if isinstance(result, dict) else ""
        reason = str(facts.get("reason") or facts.get("waitingFor") or "")
        status = str(facts.get("status", ""))
        if _id_in(facts) != job_id or (status == "done" and not _EXT.fullmatch(ext)):
            raise self._strange()
        return Order(job_id, status, ext, reason)

    def picture(self, job_id: str) -> bytes:
        """What the job brought. Raises as :meth:`queue` does."""
        return self._checked(self._send("GET", f"/api/jobs/{job_id}/result")).content

    def _send(self, method: str, path: str, body: bytes | None = None) -> Answer:
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            return self._transport.send(method, path, token=self._token, headers=headers, data=body)
        except StudioUnavailable as error:
            raise StudioUnavailable(
                f"the studio at {self.address} cannot be reached: {error.reason}; start it (studio-worker"
                " local-studio), or name another with --studio",
                is_answer_lost=error.is_answer_lost,
                reason=error.reason,
            ) from None

    def _checked(self, answer: Answer) -> Answer:
        if 200 <= answer.status < 300:
            return answer
        said = _complaint(answer) or f"HTTP {answer.status}"
        if answer.status == 401:
            raise RefusedByStudio(
                f"{self.address} wants another token than the one in {self._token_source}"
                if self._token
                else f"{self.address} wants its token: --token-file FILE"
            )
        if answer.status in (408, 429) or answer.status >= 500:
            raise StudioUnavailable(
                f"the studio at {self.address} says: {said}",
                status=answer.status,
                is_answer_lost=answer.status >= 500,  # of what was done before something failed
            )
        if not _complaint(answer):
            raise self._strange()
        raise OrderRefused(f"the studio says: {said}")

    def _strange(self) -> StudioUnavailable:
        return StudioUnavailable(f"what answers at {self.address} is no local studio")

    def _no_studio(self) -> ConfigError:
        return ConfigError(
            f"at {self.address} there is no local studio",
            cure="give the address that studio-worker local-studio prints",
            key="--studio",
        )


def _is_anothers(answer: Answer) -> bool:
    """Whether no local studio answers so to an order: its refusals have a sentence, and it has the path. What
    stands before one may ask for a password, or say that it is away for now.
    """
    if answer.status in (404, 405, 501) or answer.status < 400:
        return not 200 <= answer.status < 300
    return answer.status not in (401, 408, 429) and answer.status < 500 and not _complaint(answer)


def _complaint(answer: Answer) -> str:
    return str((_facts(answer) or {}).get("error", ""))


def _id_in(facts: Mapping[str, Any]) -> str:
    job_id = str(facts.get("jobId", ""))
    return job_id if _JOB_ID.fullmatch(job_id) else ""


def _facts(answer: Answer) -> dict[str, Any] | None:
    try:
        facts = json.loads(answer.content)
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _root(address: str) -> str:
    try:
        parts = urlsplit(address)
        lacks = _lack(address, parts)
    except ValueError:  # a port that is no number, half a bracket
        lacks = "its host or port is none"
    if lacks:
        shown, meant = safe_url(address), safe_url(f"http://{_SCHEME.sub('', address, count=1)}")
        if "://" not in address:
            shown = meant.removeprefix("http://")
        is_told = not shown.startswith("[")  # what may hold a password is not shown
        raise ConfigError(
            f"{repr(shown) if is_told else 'this'} is no address of a studio: {lacks}",
            cure=f"write {meant}" if is_told and "://" not in address else "write e.g. http://127.0.0.1:8765",
            key="--studio",
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def _lack(address: str, parts: SplitResult) -> str:
    if not address.strip():
        return "it is empty"
    if "://" not in address:
        return "http:// is missing"
    if parts.scheme not in ("http", "https"):
        return "it begins with neither http:// nor https://"
    if not parts.hostname:
        return "it names no host"
    return "port 0 is none" if parts.port == 0 else ""
