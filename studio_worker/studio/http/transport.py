"""One HTTP call to the studio: sent, over a warm connection where there is one, and its answer read.

Limits sizes and times, whatever the studio sends, and follows no redirect; what an answer means is the
caller's business (``api.py``).
"""

from __future__ import annotations

import contextlib
import errno
import ssl
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import requests
import urllib3

from studio_worker import __version__
from studio_worker.errors import StudioUnavailable
from studio_worker.network import certificates
from studio_worker.network.connecting import Adapter, Reached
from studio_worker.network.reasons import innermost, reason
from studio_worker.studio.http.body import Body
from studio_worker.studio.http.route import route_to

USER_AGENT = f"studio-worker/{__version__}"

_TIMEOUT_S = (15.0, 60.0)
"""For the connection and each piece sent; for the wait for an answer. An upload may take longer in all."""
_ANSWER_LIMIT_S = 60.0
_ANSWER_LIMIT_BYTES = 1024 * 1024
_WARM_S = 4.0
"""So long a connection is used again: less than servers keep an idle one (uvicorn 5 s, nginx 75 s)."""


class Answer(NamedTuple):
    """``is_second``: the one to a try just before was lost."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    is_second: bool = False


class _Warm(NamedTuple):
    """A connection that has answered, and when."""

    session: requests.Session
    used_at: float


class Transport:
    """Calls to what lies under ``root``. Safe from several threads, which share warm connections.

    Args:
        answer_limit_bytes: no answer may be larger.

    Raises:
        ConfigError: the environment names a proxy or certificates that cannot be used.
    """

    def __init__(self, root: str, answer_limit_bytes: int = _ANSWER_LIMIT_BYTES) -> None:
        self.route = route_to(root)
        self._root = root
        self._answer_limit_bytes = answer_limit_bytes
        self._reached = Reached()
        self._guard = threading.Lock()
        self._warm: list[_Warm] = []

    def send(
        self,
        method: str,
        path: str,
        *,
        token: str = "",
        headers: dict[str, str] | None = None,
        data: Body | bytes | None = None,
    ) -> Answer:
        """One request, and what came back, whatever its status.

        Raises:
            StudioUnavailable: no answer came, or one beyond the limits of size and time.
            OSError: ``data`` cannot be read.
        """
        headers = {"User-Agent": USER_AGENT, **(headers or {})}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        body = Body([data]) if isinstance(data, bytes) else data
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
            if body is not None and body.failure is not None:
                raise body.failure from None
            why = _why(error)
            raise StudioUnavailable(
                f"the studio cannot be reached: {why}", is_answer_lost=is_lost or _is_sent(body), reason=why
            ) from None

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # the route has read the environment; a netrc must not replace the token
        for scheme in ("http://", "https://"):
            session.mount(scheme, Adapter(stall_s=_TIMEOUT_S[1], reached=self._reached))
        return session

    def _take_warm(self) -> requests.Session | None:
        """The connection that has answered last, where that was lately.

        Between two pictures the device waits for the upload, and a new connection costs two or three round
        trips. After a pause none is trusted: what drops an idle one on the way often does so without a word,
        and the picture would wait for the time limit.
        """
        since = time.monotonic() - _WARM_S
        with self._guard:
            old = [warm for warm in self._warm if warm.used_at < since]
            self._warm = [warm for warm in self._warm if warm.used_at >= since]
            found = self._warm.pop() if self._warm else None
        for warm in old:
            warm.session.close()
        return None if found is None else found.session

    def _send_by(
        self,
        session: requests.Session,
        method: str,
        path: str,
        headers: dict[str, str],
        body: Body | None,
    ) -> Answer:
        route = self.route
        try:
            with session.request(
                method,
                self._root + path,
                headers=headers,
                data=body,
                timeout=_TIMEOUT_S,
                allow_redirects=False,
                stream=True,
                proxies={"http": route.proxy, "https": route.proxy} if route.proxy else {},
                verify=route.trusted,
            ) as response:
                answer = Answer(
                    response.status_code, response.headers, _content(response, self._answer_limit_bytes)
                )
        except BaseException:
            session.close()
            raise
        with self._guard:
            self._warm.append(_Warm(session, time.monotonic()))
        return answer


def _is_sent(body: Body | None) -> bool:
    return body is not None and body.is_sent()


def _content(response: requests.Response, limit_bytes: int) -> bytes:
    """The answer's body. Raises OSError where it is endless or trickles."""
    deadline = time.monotonic() + _ANSWER_LIMIT_S
    content = bytearray()
    for piece in response.iter_content(64 * 1024):
        content += piece
        if len(content) > limit_bytes or time.monotonic() > deadline:
            raise OSError(errno.EMSGSIZE, "its answer has no end")
    return bytes(content)


def untrusted(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with the studio's certificate, or with this machine's clock."""
    cure = certificates.cure(
        error, "see the machine's clock, and install the studio's CA (update-ca-certificates)"
    )
    return f"the studio's certificate is not trusted ({error.verify_message}); {cure}"


def _why(error: BaseException) -> str:
    found = innermost(error)
    return untrusted(found) if isinstance(found, ssl.SSLCertVerificationError) else reason(found)
