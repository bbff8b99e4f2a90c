"""Checks of the way to the studio: names, proxy, certificates, clock, and whether it answers."""

from __future__ import annotations

import datetime
import email.utils
import os
import socket
import ssl
import time
from urllib.parse import urlsplit

import requests

from studio_worker.doctor.results import Box, Result, failure, ok, warning
from studio_worker.network.urls import safe_url
from studio_worker.studio.http.api import api_root
from studio_worker.studio.http.route import route_to
from studio_worker.studio.http.transport import USER_AGENT
from studio_worker.wording import in_container

_CONNECT_S = 10.0
_CLOCK_WARNING_S = 30.0
_CLOCK_FAILURE_S = 300.0
"""Beyond five minutes tokens and certificates begin to be refused."""
_CERTIFICATE_DAYS = 7
_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def check_dns(box: Box) -> Result:
    """The studio's name and those of the required models' hosts, unless a proxy looks them up."""
    urls = [_studio(box), *(file.url for model in box.config.required for file in model.files)]
    unknown, seen = [], 0
    for url in {urlsplit(url).netloc: url for url in urls}.values():
        parts = urlsplit(url)
        if _proxy(url) or parts.hostname is None:
            continue
        seen += 1
        try:
            socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            unknown.append(parts.hostname)
    if unknown:
        return failure(
            f"no address is known for {', '.join(unknown)}",
            "check the spelling in the configuration, and the name servers (resolvectl status)",
        )
    return ok(f"{seen} host name(s) resolved" if seen else "left to the proxy")


def check_proxy(box: Box) -> Result:
    """Which proxy is used, and whether it can be reached."""
    proxies = {proxy for proxy in (_proxy(_studio(box)), box.config.settings.models.proxy) if proxy}
    for proxy in sorted(proxies):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        try:
            socket.create_connection((parts.hostname or "", parts.port or 80), _CONNECT_S).close()
        except (OSError, ValueError) as error:
            return failure(
                f"the proxy {_shown(proxy)} cannot be reached ({type(error).__name__})",
                "mend the address in the environment or under [models] proxy; NO_PROXY lists exceptions",
            )
    if not proxies:
        return ok("none is used")
    text = f"{', '.join(map(_shown, sorted(proxies)))} can be reached"
    if any(os.environ.get(name) for name in _PROXY_VARIABLES) and not (
        "INVOCATION_ID" in os.environ or in_container()
    ):
        return warning(
            f"{text}; it is set in this shell, which the service does not see",
            "set it for the service too: systemctl edit studio-worker, [Service], Environment=HTTPS_PROXY=…",
        )
    return ok(text)


def check_tls(box: Box) -> Result:
    """The studio's certificate, by the authorities that requests trusts."""
    url = _studio(box)
    parts = urlsplit(url)
    if parts.scheme != "https":
        if parts.hostname in {"localhost", "127.0.0.1", "::1"}:
            return ok("not needed: the studio is on this machine")
        return warning("the studio is asked over plain http", "use https unless the network is your own")
    if _proxy(url):
        return ok("checked through the proxy, see studio")
    context = route_to(url).ssl_context()
    assert parts.hostname is not None
    try:
        with (
            socket.create_connection((parts.hostname, parts.port or 443), _CONNECT_S) as connection,
            context.wrap_socket(connection, server_hostname=parts.hostname) as secured,
        ):
            version, certificate = secured.version(), secured.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        return failure(
            f"the studio's certificate is not trusted: {error.verify_message}",
            "check the clock; behind a proxy that breaks TLS, name its authority in REQUESTS_CA_BUNDLE",
        )
    except OSError as error:
        return failure(f"no TLS connection to {parts.hostname}: {type(error).__name__}", "see studio")
    expires = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    day = datetime.datetime.fromtimestamp(expires, datetime.UTC).date()
    if expires - time.time() < _CERTIFICATE_DAYS * 86_400:
        return warning(f"{version}, the certificate ends on {day}", "tell whoever runs the studio")
    return ok(f"{version}, the certificate is valid until {day}")


def check_studio(box: Box) -> Result:
    """Whether the studio answers at all; what it answers needs no account."""
    url = _studio(box)
    began = time.monotonic()
    try:
        response = _ask(url)
    except requests.RequestException as error:
        return failure(
            f"{safe_url(url)} cannot be reached ({_reason(error)})",
            "check the address under [studio], the network, firewall and proxy",
        )
    took_ms = (time.monotonic() - began) * 1000
    if response.status_code >= 500:
        return warning(
            f"{safe_url(url)} answers HTTP {response.status_code}", "wait, or tell whoever runs the studio"
        )
    return ok(f"{safe_url(url)} answers in {took_ms:.0f} ms")


def check_clock(box: Box) -> Result:
    """Our clock against the studio's, by the Date header of an answer."""
    try:
        response = _ask(_studio(box))
    except requests.RequestException:
        return warning("not compared: the studio cannot be reached", "see studio")
    try:
        theirs = email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (KeyError, ValueError):
        return ok("not compared: the studio's answer has no date")
    off_s = time.time() - theirs
    text = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the studio's"
    cure = "timedatectl set-ntp true"
    if abs(off_s) > _CLOCK_FAILURE_S:
        return failure(text, cure)
    return warning(text, cure) if abs(off_s) > _CLOCK_WARNING_S else ok(text)


def _ask(url: str) -> requests.Response:
    route = route_to(url)
    with requests.Session() as session:
        session.trust_env = False  # the route is what the environment says, as the service reads it
        return session.get(
            url,
            headers={"User-Agent": USER_AGENT},
            proxies={"http": route.proxy, "https": route.proxy} if route.proxy else {},
            verify=route.trusted,
            timeout=_CONNECT_S,
            allow_redirects=False,
            stream=True,  # its body may have no end
        )


def _studio(box: Box) -> str:
    return api_root(box.config.settings.studio.api_base_url)


def _proxy(url: str) -> str | None:
    return route_to(url).proxy


def _shown(proxy: str) -> str:
    return safe_url(proxy if "://" in proxy else f"http://{proxy}")


def _reason(error: requests.RequestException) -> str:
    """The kind of error alone: the text of one may hold an address with a password."""
    inner = error.args[0] if error.args else None
    cause = getattr(inner, "reason", None)
    return type(cause or error).__name__
