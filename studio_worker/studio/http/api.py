"""The studio's HTTP calls: registration, polling, upload. One attempt each; retrying is the caller's."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import requests
import urllib3
from pydantic import TypeAdapter, ValidationError

from studio_worker import __version__
from studio_worker.errors import (
    DeliveryRefused,
    RefusedByStudio,
    StudioUnavailable,
    UnknownRegistration,
)
from studio_worker.network import certificates
from studio_worker.network.connecting import Adapter, Reached
from studio_worker.network.reasons import innermost, reason
from studio_worker.network.retry_after import retry_after_s
from studio_worker.spool.delivery import Delivery
from studio_worker.studio.http.route import route_to
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
"""For the connection and each piece sent; for the wait for an answer. An upload may take longer in all."""
_ANSWER_LIMIT_S = 60.0
_ANSWER_LIMIT_BYTES = 1024 * 1024
_WARM_S = 4.0
"""So long a connection is used again: less than servers keep an idle one (uvicorn 5 s, nginx 75 s)."""
_RETRY_AFTER_CAP_S = 3600.0
"""A studio that asks for more is asked again after an hour: it may have been a mistake."""

_B = TypeVar("_B")
_REGISTERED = TypeAdapter(RegisterAnswer)


_GATEWAY_STATUSES = frozenset({502, 504})
"""What stands before the studio has sent the request on and got no answer to it (RFC 9110, 15.6)."""


class _Answer(NamedTuple):
    """``is_second``: the one to a try just before was lost."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    is_second: bool = False


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

    Raises:
        ConfigError: the environment names a proxy or certificates that cannot be used.
    """

    def __init__(self, api_base_url: str) -> None:
        self.root = api_root(api_base_url)
        self.route = route_to(self.root)
        self._reached = Reached()
        self._warm = threading.local()

    def session_url(self, worker_id: str) -> str:
        """The WebSocket address of a worker's session."""
        scheme, rest = self.root.split("://", 1)
        return f"{'wss' if scheme == 'https' else 'ws'}://{rest}/workers/{quote(worker_id, safe='')}/connect"

    def register(self, body: RegisterRequest) -> RegisterAnswer:
        """Ask to be registered; the same install id gets the same request id again.

        Raises:
            StudioUnavailable: anything but a readable 2xx answer.
        """
        answer = self._send(
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
        answer = self._send("GET", f"/workers/register-requests/{quote(request_id, safe='')}", token=secret)
        if answer.status in {401, 404}:
            raise UnknownRegistration(f"the studio answered HTTP {answer.status} to our request")
        return _read(DECISION, answer)

    def upload(self, worker_id: str, token: str, delivery: Delivery) -> None:
        """Deliver one finished picture.

        Raises:
            DeliveryRefused: 4xx that no retry will mend.
            RefusedByStudio: 401, the token is not accepted.
            StudioUnavailable: anything that may pass.
            OSError: the picture cannot be read.
        """
        fields: dict[str, Any] = {"prompt": delivery.prompt, "ext": delivery.ext}
        if delivery.meta:
            fields["generationMeta"] = json.dumps(dict(delivery.meta), ensure_ascii=False)
        fields["image"] = (f"{delivery.job_id}.{delivery.ext}", delivery.read(), mime_type(delivery.ext))
        body, content_type = urllib3.encode_multipart_formdata(fields)
        answer = self._send(
            "POST",
            f"/workers/{quote(worker_id, safe='')}/jobs/{quote(delivery.job_id, safe='')}/complete",
            token=token,
            headers={"Content-Type": content_type},
            data=body,
        )
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

    def _send(
        self,
        method: str,
        path: str,
        *,
        token: str = "",
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
    ) -> _Answer:
        """One request; its answer is read within limits of size and time, whatever the studio sends."""
        headers = {"User-Agent": USER_AGENT, **(headers or {})}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        # Read piece by piece: one write of everything would have to be through within the time limit.
        body = None if data is None else io.BytesIO(data)
        is_lost = False
        try:
            if (warm := self._take_warm()) is not None:
                # The other side may be closing it at this very moment; that is no failure.
                with contextlib.suppress(requests.ConnectionError):
                    return self._send_by(warm, method, path, headers, body)
                is_lost = _is_sent(body)
                if body is not None:
                    body.seek(0)
            answer = self._send_by(self._new_session(), method, path, headers, body)
            return answer._replace(is_second=is_lost)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise StudioUnavailable(
                f"the studio cannot be reached: {_why(error)}", is_answer_lost=is_lost or _is_sent(body)
            ) from None

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # the route has read the environment; a netrc must not replace the token
        for scheme in ("http://", "https://"):
            session.mount(scheme, Adapter(stall_s=_TIMEOUT_S[1], reached=self._reached))
        return session

    def _take_warm(self) -> requests.Session | None:
        """This thread's connection, where it has answered lately.

        Between two pictures the device waits for the upload, and a new connection costs two or three round
        trips. After a pause none is trusted: what drops an idle one on the way often does so without a word,
        and the picture would wait for the time limit.
        """
        session: requests.Session | None = getattr(self._warm, "session", None)
        self._warm.session = None
        if session is not None and time.monotonic() - self._warm.used_at > _WARM_S:
            session.close()
            return None
        return session

    def _send_by(
        self,
        session: requests.Session,
        method: str,
        path: str,
        headers: dict[str, str],
        body: io.BytesIO | None,
    ) -> _Answer:
        route = self.route
        try:
            with session.request(
                method,
                self.root + path,
                headers=headers,
                data=body,
                timeout=_TIMEOUT_S,
                allow_redirects=False,
                stream=True,
                proxies={"http": route.proxy, "https": route.proxy} if route.proxy else {},
                verify=route.trusted,
            ) as response:
                answer = _Answer(response.status_code, response.headers, _content(response))
        except BaseException:
            session.close()
            raise
        self._warm.session, self._warm.used_at = session, time.monotonic()
        return answer


def _is_sent(body: io.BytesIO | None) -> bool:
    """Whether all of it was taken for sending: without its end no studio takes a request for whole."""
    return body is not None and body.tell() == len(body.getbuffer())


def _content(response: requests.Response) -> bytes:
    """The answer's body. Raises OSError where it is endless or trickles."""
    deadline = time.monotonic() + _ANSWER_LIMIT_S
    content = bytearray()
    for piece in response.iter_content(64 * 1024):
        content += piece
        if len(content) > _ANSWER_LIMIT_BYTES or time.monotonic() > deadline:
            raise OSError(errno.EMSGSIZE, "its answer has no end")
    return bytes(content)


def _expect_ok(answer: _Answer) -> None:
    if 200 <= answer.status < 300:
        return
    raise StudioUnavailable(
        f"the studio answered HTTP {answer.status}{hint(answer.status)}",
        status=answer.status,
        retry_after_s=retry_after_s(answer.headers, _RETRY_AFTER_CAP_S),
        is_answer_lost=answer.status in _GATEWAY_STATUSES,
    )


def _is_page(answer: _Answer) -> bool:
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


def _read(kind: TypeAdapter[_B], answer: _Answer) -> _B:
    _expect_ok(answer)
    try:
        return kind.validate_json(answer.content)
    except ValidationError as error:
        raise StudioUnavailable("the studio's answer is not readable", status=answer.status) from error


def untrusted(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with the studio's certificate, or with this machine's clock."""
    cure = certificates.cure(
        error, "see the machine's clock, and install the studio's CA (update-ca-certificates)"
    )
    return f"the studio's certificate is not trusted ({error.verify_message}); {cure}"


def _why(error: BaseException) -> str:
    found = innermost(error)
    return untrusted(found) if isinstance(found, ssl.SSLCertVerificationError) else reason(found)
