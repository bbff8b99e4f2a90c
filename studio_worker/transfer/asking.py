"""One GET sent: its address checked at every hop, its token and proxy chosen for each host anew.

Where redirects led is remembered for the next request of the same download, until that is refused there.

Refuses what the rules for addresses refuse, before anything is asked of it, and bodies in another coding
than the file's own bytes. No error text holds a query string, a fragment or user info, and no error carries
the library's own, whose texts do.
"""

from __future__ import annotations

import contextlib
import http
import os
import re
import ssl
from collections.abc import Mapping
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from studio_worker import __version__
from studio_worker.errors import DownloadError, DownloadRefused
from studio_worker.network import certificates
from studio_worker.network.connecting import Adapter
from studio_worker.network.reasons import innermost, reason
from studio_worker.network.urls import is_loopback, safe_url, url_problem
from studio_worker.transfer.policy import Policy

_MAX_REDIRECTS = 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_EXPIRED = frozenset({400, 401, 403, 404, 410})
"""How an address that was good for a while is refused later."""
_CODINGS = frozenset({"br", "compress", "dcb", "dcz", "deflate", "gzip", "x-compress", "x-gzip", "zstd"})
"""IANA's registry of content codings. Stores send other words too, of files that are what they are."""
_AUTHORITY_CURE = "see the machine's clock; a certificate authority of your own goes into [models] ca_bundle"
_SENDABLE = re.compile(r"/[A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]*")
"""RFC 3986, 2: what needs no escape, and escapes."""
_TUNNEL_REFUSED = re.compile(r"Tunnel connection failed: (\d{3})\b")
"""As http.client has it."""
_REQUESTS_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class Session(requests.Session):
    """Follows no redirect, and does not read a redirect's body, which may be endless, into memory."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.headers["User-Agent"] = f"studio-worker/{__version__}"
        self.hooks["response"].append(_each_once)
        check = policy.networks.check if policy.networks else None
        self.adapter = Adapter(stall_s=policy.stall_s, reached=policy.reached, check=check)
        for scheme in ("http://", "https://"):
            self.mount(scheme, self.adapter)

    def get_redirect_target(self, resp: requests.Response) -> None:  # noqa: ARG002  (requests' signature)
        return None


def _each_once(response: requests.Response, **_: object) -> None:
    """A header that is repeated word for word, as some proxies do, counts once (RFC 9110, 8.6: lengths)."""
    found = response.raw.headers
    for name in found:
        response.headers[name] = ", ".join(dict.fromkeys(found.getlist(name)))


class _Bearer(requests.auth.AuthBase):
    """A bearer token; given as ``auth`` so that no netrc entry takes its place."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        r.headers["Authorization"] = f"Bearer {self._token}"
        return r


class Target:
    """What is asked for, by all connections of one download. ``name`` is ``url`` as it may be told.

    Args:
        is_hash_known: whether what comes is judged by its hash, so that headers need not vouch for it.
    """

    def __init__(self, url: str, *, is_hash_known: bool = False) -> None:
        self.url = url
        self.name = safe_url(url)
        self.is_hash_known = is_hash_known
        self.redirected: str | None = None
        """Where the last redirect from ``url`` led."""


def ask(
    target: Target, headers: Mapping[str, str], policy: Policy, session: Session | None = None
) -> requests.Response:
    """Send the request, and on to where it is redirected; no address is asked before it is checked.

    Raises:
        DownloadError: there is no answer, or none that may be used.
    """
    with contextlib.nullcontext(session) if session else Session(policy) as used:
        if (known := target.redirected) is not None:
            with contextlib.suppress(DownloadError):
                response, _ = _follow(known, target, headers, policy, used)
                if response.status_code not in _EXPIRED:
                    return response
                response.close()
            target.redirected = None
        response, last = _follow(target.url, target, headers, policy, used)
        if last != target.url:
            target.redirected = last
        return response


def _follow(
    url: str, target: Target, headers: Mapping[str, str], policy: Policy, session: Session
) -> tuple[requests.Response, str]:
    """The answer, and the address that gave it."""
    name, first, via = target.name, url, ""
    for _ in range(_MAX_REDIRECTS + 1):
        session.adapter.target = _target(url)
        url = _checked(url, name, via, policy)
        proxies = _proxies(url, policy)
        if kind := _unusable_proxy(url, proxies):
            raise DownloadRefused(
                "request error",
                f"GET {name}: {via}a proxy of kind {kind} cannot be used; name an http proxy in https_proxy "
                "or [models] proxy, or the host in no_proxy",
            )
        try:
            response = session.get(
                url,
                headers={"Accept-Encoding": "identity", **headers},
                stream=True,
                timeout=(policy.connect_s, policy.first_byte_s),
                allow_redirects=False,
                auth=_auth(url, policy),
                proxies=proxies,
                verify=_verify(policy),
            )
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError, OSError) as error:
            raise _failed(name, via, error) from None
        if response.status_code == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            response.close()
            raise _proxy_error(name, via, response.status_code)
        location = response.headers.get("Location")
        if response.status_code not in _REDIRECTS or location is None:
            if coding := _coding(response, is_hash_known=target.is_hash_known):
                response.close()
                raise DownloadRefused(
                    "request error", f"GET {name}: {via}the server insists on coding {coding[:40]}"
                )
            return response, url if via else first
        response.close()
        try:
            url = urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
        except ValueError:
            url = ""
        via = f"redirected to {safe_url(url)}, "
    raise DownloadRefused("request error", f"GET {name}: more than {_MAX_REDIRECTS} redirects")


def _coding(response: requests.Response, *, is_hash_known: bool) -> str:
    """What the body is coded in, as far as it matters; empty for the file's own bytes."""
    named = [each.strip().lower() for each in response.headers.get("Content-Encoding", "").split(",")]
    return ", ".join(
        each for each in named if each not in {"", "identity"} and (each in _CODINGS or not is_hash_known)
    )


def _failed(name: str, via: str, error: BaseException) -> DownloadError:
    """What a request without an answer ended with, and its cure where there is one."""
    first = innermost(error)
    if isinstance(first, ssl.SSLCertVerificationError):  # it stays so for now
        words = certificates.cure(first, _AUTHORITY_CURE)
        return DownloadRefused("request error", f"GET {name}: {via}{cause(error)}; {words}")
    if found := _TUNNEL_REFUSED.match(str(first)):
        return _proxy_error(name, via, int(found[1]))
    return DownloadError("request error", f"GET {name}: {via}{cause(error)}")


def _proxy_error(name: str, via: str, status: int) -> DownloadError:
    """The proxy gave an answer of its own."""
    if status == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return DownloadRefused(
            "request error",
            f"GET {name}: {via}the proxy asks for a name and a password, or for others (407 Proxy "
            "Authentication Required); they stand in its address: http://NAME:PASSWORD@HOST:PORT",
        )
    return DownloadError("request error", f"GET {name}: {via}the proxy answered {status}")


def _checked(url: str, name: str, via: str, policy: Policy) -> str:
    """``url`` as it will be used. That spelling is checked too: parsers disagree on some host names.

    A wrong address is the job's own fault, but not one that a redirect led to: a captive portal's, say.
    """
    try:
        used = requests.Request("GET", url).prepare().url or ""
    except (requests.RequestException, ValueError):
        raise DownloadRefused(
            "request error", f"GET {name}: {via}is not a valid URL", is_jobs_fault=not via
        ) from None
    for spelling in (url, used):
        if problem := url_problem(spelling, allow_insecure=policy.allow_insecure):
            raise DownloadRefused("request error", f"GET {name}: {via}{problem}", is_jobs_fault=not via)
    if policy.networks is not None and (problem := policy.networks.literal_problem(used)):
        raise DownloadRefused("request error", f"GET {name}: {via}{problem}", is_jobs_fault=not via)
    return used


def _target(url: str) -> str:
    """Path and query of ``url`` as they stand there; empty where they cannot be sent so."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return target if _SENDABLE.fullmatch(target) else ""


def _auth(url: str, policy: Policy) -> _Bearer | None:
    """The token of the host of ``url``; no other host ever sees it, and nobody on the way reads it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    token = policy.tokens.get(host)
    is_private = parts.scheme == "https" or is_loopback(host)
    return _Bearer(token) if token and is_private else None


def _proxies(url: str, policy: Policy) -> dict[str, str] | None:
    """The proxy of the policy, but not to this machine itself or where ``no_proxy`` names the host."""
    if policy.proxy is None:
        return None
    host = urlsplit(url).hostname or ""
    if is_loopback(host) or requests.utils.should_bypass_proxies(url, no_proxy=None):
        return None
    return {"http": policy.proxy, "https": policy.proxy}


def _unusable_proxy(url: str, proxies: dict[str, str] | None) -> str:
    """The kind of the proxy that ``url`` would go through, where it is none of HTTP's."""
    chosen = proxies or requests.utils.get_environ_proxies(url)
    kind, separator, _ = (requests.utils.select_proxy(url, chosen) or "").partition("://")
    return kind if separator and kind.lower() not in {"http", "https"} else ""


def _verify(policy: Policy) -> str | None:
    """The CA bundle: the policy's, else OpenSSL's variable, which requests does not know; its own follow."""
    if policy.ca_bundle is not None:
        return str(policy.ca_bundle)
    if any(os.environ.get(variable) for variable in _REQUESTS_VARIABLES):
        return None
    # Set to nothing it names no file; handed on, an empty string would turn the check of certificates off.
    return os.environ.get("SSL_CERT_FILE") or None


def cause(error: BaseException) -> str:
    """The innermost reason of a requests error, with its name."""
    found, words = type(innermost(error)).__name__, reason(error)
    return found if words == found else f"{found}: {words}"
