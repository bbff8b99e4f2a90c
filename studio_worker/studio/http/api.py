"""The studio's HTTP calls: registration, polling, upload. One attempt each; retrying is the caller's."""

from __future__ import annotations

import json
import secrets
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import urllib3
from pydantic import TypeAdapter, ValidationError

from studio_worker.errors import (
    DeliveryRefused,
    RefusedByStudio,
    StudioUnavailable,
    UnknownRegistration,
)
from studio_worker.network.retry_after import retry_after_s
from studio_worker.network.uplink import Uplink
from studio_worker.spool.delivery import Delivery
from studio_worker.studio.http.body import Body
from studio_worker.studio.http.transport import Answer, Transport
from studio_worker.studio.wire import (
    DECISION,
    Approved,
    Pending,
    RegisterAnswer,
    RegisterRequest,
    Rejected,
    mime_type,
)

_ROUTE = "/graphics/api"
_RETRY_AFTER_CAP_S = 3600.0
"""A studio that asks for more is asked again after an hour: it may have been a mistake."""

_B = TypeVar("_B")
_REGISTERED = TypeAdapter(RegisterAnswer)


_GATEWAY_STATUSES = frozenset({502, 504})
"""What stands before the studio has sent the request on and got no answer to it (RFC 9110, 15.6)."""


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
        uplink: what uploads wait for.

    Raises:
        ConfigError: the environment names a proxy or certificates that cannot be used.
    """

    def __init__(self, api_base_url: str, uplink: Uplink | None = None) -> None:
        self.root = api_root(api_base_url)
        self._transport = Transport(self.root)
        self.route = self._transport.route
        self._uplink = uplink or Uplink()

    def session_url(self, worker_id: str) -> str:
        """The WebSocket address of a worker's session."""
        scheme, rest = self.root.split("://", 1)
        return f"{'wss' if scheme == 'https' else 'ws'}://{rest}/workers/{quote(worker_id, safe='')}/connect"

    def register(self, body: RegisterRequest) -> RegisterAnswer:
        """Ask to be registered; the same install id gets the same request id again.

        Raises:
            StudioUnavailable: anything but a readable 2xx answer.
        """
        answer = self._transport.send(
            "POST",
            "/workers/register-request",
            data=body.to_json().encode(),
            headers={"Content-Type": "application/json"},
        )
        return _read(_REGISTERED, answer)

    def poll(self, request_id: str, secret: str) -> Pending | Approved | Rejected:
        """The decision on a registration request.

        Raises:
            UnknownRegistration: 404 or 401; drop request id and secret and start over.
            StudioUnavailable: anything else that is no readable answer.
        """
        answer = self._transport.send(
            "GET", f"/workers/register-requests/{quote(request_id, safe='')}", token=secret
        )
        if answer.status in {401, 404}:
            raise UnknownRegistration(f"the studio answered HTTP {answer.status} to our request")
        return _read(DECISION, answer)

    def upload(self, worker_id: str, token: str, delivery: Delivery) -> float:
        """Deliver one finished picture. Returns how many seconds it waited for other uploads.

        Raises:
            DeliveryRefused: 4xx that no retry will mend.
            RefusedByStudio: 401, the token is not accepted.
            StudioUnavailable: anything that may pass.
            OSError: the picture cannot be read.
        """
        path = f"/workers/{quote(worker_id, safe='')}/jobs/{quote(delivery.job_id, safe='')}/complete"
        head, tail, content_type = _form(delivery)
        with self._uplink.turn() as turn, delivery.opened() as picture:
            answer = self._transport.send(
                "POST",
                path,
                token=token,
                headers={"Content-Type": content_type},
                data=Body([head, picture, tail], partial(self._uplink.sent, turn)),
            )
        _expect_taken(answer)
        return turn.waited_s


def _form(delivery: Delivery) -> tuple[bytes, bytes, str]:
    """What an upload sends before the picture and after it, and its content type."""
    fields: dict[str, Any] = {"prompt": delivery.prompt, "ext": delivery.ext}
    if delivery.meta:
        fields["generationMeta"] = json.dumps(dict(delivery.meta), ensure_ascii=False)
    fields["image"] = (f"{delivery.job_id}.{delivery.ext}", b"", mime_type(delivery.ext))
    boundary = secrets.token_hex(16)
    form, content_type = urllib3.encode_multipart_formdata(fields, boundary)
    tail = f"\r\n--{boundary}--\r\n".encode()
    return form.removesuffix(tail), tail, content_type


def _expect_taken(answer: Answer) -> None:
    """Raises what :meth:`StudioApi.upload` does, where the studio has not taken the picture."""
    if answer.status == 401:
        raise RefusedByStudio("the studio does not accept this worker's token any more")
    # 407 is not the studio's word but that of a proxy beside us.
    if 400 <= answer.status < 500 and answer.status not in {407, 408, 429}:
        raise DeliveryRefused(answer.status, is_answer_lost=answer.is_second)
    _expect_ok(answer)
    if _is_page(answer):
        raise StudioUnavailable(
            f"a web page came in place of the studio's answer (HTTP {answer.status}): something on the "
            "way answers for it, a network's sign-in page most likely"
        )


def _expect_ok(answer: Answer) -> None:
    if 200 <= answer.status < 300:
        return
    raise StudioUnavailable(
        f"the studio answered HTTP {answer.status}{hint(answer.status)}",
        status=answer.status,
        retry_after_s=retry_after_s(answer.headers, _RETRY_AFTER_CAP_S),
        is_answer_lost=answer.status in _GATEWAY_STATUSES,
    )


def _is_page(answer: Answer) -> bool:
    """Whether a browser would show it as a page; no studio's answer is one (protocol §6.7)."""
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    begin = answer.content.lstrip(b"\xef\xbb\xbf \t\r\n")[:15].lower()
    if kind in {"text/html", "application/xhtml+xml"}:
        return begin.startswith(b"<")
    return begin.startswith((b"<!doctype html", b"<html"))


def hint(status: int) -> str:
    """What an operator should look at, where a studio that works does not answer so; empty for the rest."""
    if 300 <= status < 400:
        return "; redirects are not followed, set [studio] api_base_url to the studio's own address"
    return {
        403: "; a firewall or proxy before the studio may be in the way",
        404: "; is [studio] api_base_url right?",
    }.get(status, "")


def _read(kind: TypeAdapter[_B], answer: Answer) -> _B:
    _expect_ok(answer)
    try:
        return kind.validate_json(answer.content)
    except ValidationError as error:
        raise StudioUnavailable("the studio's answer is not readable", status=answer.status) from error
