"""What a person's script asks of a studio of one's own: queue a job, see how it stands, fetch its picture.

Calls the local studio's ``/api``; one attempt each. What it answers is checked before it names a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from studio_worker.errors import ConfigError, OrderRefused, RefusedByStudio, StudioUnavailable
from studio_worker.network.urls import safe_url
from studio_worker.studio.http.transport import Answer, Transport

_RESULT_LIMIT_BYTES = 128 << 20
"""A local studio takes results of 100 MiB."""

_JOB_ID = re.compile(r"[0-9A-Za-z_-]{1,200}")
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

    Raises:
        ConfigError: it is no http address, or the environment's proxy or certificates cannot be used.
    """

    def __init__(self, address: str, token: str = "") -> None:
        self._address = safe_url(address)
        self._token = token
        self._transport = Transport(_root(address), _RESULT_LIMIT_BYTES)

    def queue(self, job: Mapping[str, Any]) -> Order:
        """Queue a job; ``job`` is the body of ``POST /api/jobs``.

        Raises:
            OrderRefused: the studio says what is wrong with it.
            RefusedByStudio: it wants another token.
            StudioUnavailable: no answer came, or one that is none of a studio's.
        """
        facts = self._ask("POST", "/api/jobs", json.dumps(job, allow_nan=False).encode())
        return Order(self._id_in(facts), "queued")

    def see(self, job_id: str) -> Order:
        """How it stands. Raises as :meth:`queue` does."""
        facts = self._ask("GET", f"/api/jobs/{job_id}")
        result = facts.get("result")
        ext = str(result.get("ext", "")) if isinstance(result, dict) else ""
        reason = str(facts.get("reason") or facts.get("waitingFor") or "")
        status = str(facts.get("status", ""))
        if self._id_in(facts) != job_id or (status == "done" and not _EXT.fullmatch(ext)):
            raise self._strange()
        return Order(job_id, status, ext, reason)

    def picture(self, job_id: str) -> bytes:
        """What the job brought. Raises as :meth:`queue` does."""
        return self._checked(self._send("GET", f"/api/jobs/{job_id}/result")).content

    def _id_in(self, facts: Mapping[str, Any]) -> str:
        job_id = str(facts.get("jobId", ""))
        if not _JOB_ID.fullmatch(job_id):
            raise self._strange()
        return job_id

    def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        answer = self._checked(self._send(method, path, body))
        facts = _facts(answer)
        if facts is None:
            raise self._strange()
        return facts

    def _send(self, method: str, path: str, body: bytes | None = None) -> Answer:
        headers = {} if body is None else {"Content-Type": "application/json"}
        return self._transport.send(method, path, token=self._token, headers=headers, data=body)

    def _checked(self, answer: Answer) -> Answer:
        if 200 <= answer.status < 300:
            return answer
        said = str((_facts(answer) or {}).get("error", "")) or f"HTTP {answer.status}"
        if answer.status == 401:
            raise RefusedByStudio(f"{self._address} wants its token: --token-file FILE")
        if answer.status in (408, 429) or answer.status >= 500:
            raise StudioUnavailable(f"the studio says: {said}", status=answer.status)
        raise OrderRefused(f"the studio says: {said}")

    def _strange(self) -> StudioUnavailable:
        return StudioUnavailable(f"what answers at {self._address} is no local studio")


def _facts(answer: Answer) -> dict[str, Any] | None:
    try:
        facts = json.loads(answer.content)
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _root(address: str) -> str:
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(
            f"{safe_url(address)!r} is no address of a studio",
            cure="write e.g. http://127.0.0.1:8765",
            key="--studio",
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
