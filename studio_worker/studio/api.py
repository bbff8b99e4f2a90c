"""The studio's HTTP calls: registration, polling, upload. One attempt each; retrying is the caller's."""

from __future__ import annotations

import json
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import requests
from pydantic import BaseModel, ValidationError

from studio_worker import __version__
from studio_worker.errors import (
    DeliveryRefused,
    RefusedByStudio,
    StudioUnavailable,
    UnknownRegistration,
)
from studio_worker.spool import Delivery
from studio_worker.studio.wire import (
    DECISION,
    Approved,
    Pending,
    RegisterAnswer,
    RegisterRequest,
    Rejected,
    mime_type,
)

USER_AGENT = f"studio-worker/{__version__}"

_ROUTE = "/graphics/api"
_TIMEOUT_S = (15.0, 60.0)
"""Connect and inactivity limits; a large upload may take longer than this in all."""

_B = TypeVar("_B", bound=BaseModel)


def api_root(api_base_url: str) -> str:
    """The address every route lives under: without query, fragment and trailing slash, route added once."""
    parts = urlsplit(api_base_url)
    path = parts.path.rstrip("/")
    if not path.endswith(_ROUTE):
        path += _ROUTE
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


class StudioApi:
    """The HTTP side of one studio. Instances may be used from several threads.

    Args:
        api_base_url: as configured; any of the forms that :func:`api_root` understands.
    """

    def __init__(self, api_base_url: str) -> None:
        self.root = api_root(api_base_url)

    def session_url(self, worker_id: str) -> str:
        """The WebSocket address of a worker's session."""
        scheme, rest = self.root.split("://", 1)
        return f"{'wss' if scheme == 'https' else 'ws'}://{rest}/workers/{quote(worker_id, safe='')}/connect"

    def register(self, body: RegisterRequest) -> RegisterAnswer:
        """Ask to be registered; the same install id gets the same request id again.

        Raises:
            StudioUnavailable: anything but a readable 2xx answer.
        """
        response = self._send(
            "POST",
            "/workers/register-request",
            data=body.to_json(),
            headers={"Content-Type": "application/json"},
        )
        self._expect_ok(response)
        return self._read(RegisterAnswer, response)

    def poll(self, request_id: str, secret: str) -> Pending | Approved | Rejected:
        """The decision on a registration request.

        Raises:
            UnknownRegistration: 404 or 401; drop request id and secret and start over.
            StudioUnavailable: anything else that is no readable answer.
        """
        response = self._send("GET", f"/workers/register-requests/{quote(request_id, safe='')}", token=secret)
        if response.status_code in {401, 404}:
            raise UnknownRegistration(f"the studio answered HTTP {response.status_code} to our request")
        self._expect_ok(response)
        try:
            return DECISION.validate_json(response.content)
        except ValidationError as error:
            raise StudioUnavailable("the studio's answer is not readable") from error

    def upload(self, worker_id: str, token: str, delivery: Delivery) -> None:
        """Deliver one finished picture.

        Raises:
            DeliveryRefused: 4xx that no retry will mend.
            RefusedByStudio: 401, the token is not accepted.
            StudioUnavailable: anything that may pass.
        """
        fields = {"prompt": delivery.prompt, "ext": delivery.ext}
        if delivery.meta:
            fields["generationMeta"] = json.dumps(dict(delivery.meta), ensure_ascii=False)
        with delivery.data_path.open("rb") as data:
            response = self._send(
                "POST",
                f"/workers/{quote(worker_id, safe='')}/jobs/{quote(delivery.job_id, safe='')}/complete",
                token=token,
                data=fields,
                files={"image": (f"{delivery.job_id}.{delivery.ext}", data, mime_type(delivery.ext))},
            )
        status = response.status_code
        if status == 401:
            raise RefusedByStudio("the studio does not accept this worker's token any more")
        if 400 <= status < 500 and status not in {408, 429}:
            raise DeliveryRefused(status)
        self._expect_ok(response)

    def _send(
        self, method: str, path: str, *, token: str = "", headers: dict[str, str] | None = None, **body: Any
    ) -> requests.Response:
        headers = {"User-Agent": USER_AGENT, **(headers or {})}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            return requests.request(
                method,
                self.root + path,
                headers=headers,
                timeout=_TIMEOUT_S,
                allow_redirects=False,
                **body,
            )
        except requests.RequestException as error:
            raise StudioUnavailable(f"the studio cannot be reached: {type(error).__name__}") from error

    @staticmethod
    def _expect_ok(response: requests.Response) -> None:
        if 200 <= response.status_code < 300:
            return
        after = response.headers.get("Retry-After", "")
        raise StudioUnavailable(
            f"the studio answered HTTP {response.status_code}",
            retry_after_s=float(after) if after.isdigit() else None,
        )

    @staticmethod
    def _read(kind: type[_B], response: requests.Response) -> _B:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise StudioUnavailable("the studio's answer is not readable") from error
