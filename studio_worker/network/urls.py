"""Which URLs may be used at all. Pure: resolves no names; where a name leads is addresses.py's to judge."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def url_problem(url: str, *, allow_insecure: bool) -> str | None:
    """Why a model or input file must not be fetched from ``url``, or ``None`` where it may.

    https everywhere; plain http only on loopback, or where ``allow_insecure`` says so.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # raises where the port is not a number
    except ValueError:
        return "is not a valid URL"
    if parts.scheme not in {"http", "https"} or not host:
        return "is not an http(s) URL" + ("" if "://" in url else "; begin it with https://")
    if parts.scheme == "http" and not allow_insecure and not is_loopback(host):
        return "is plain http; use https, or set allow_insecure_urls = true under [models]"
    return None


def input_url_problem(url: str, *, allow_insecure: bool) -> str | None:
    """The same of an input picture, which may also stand in its address (RFC 2397)."""
    return None if is_data_url(url) else url_problem(url, allow_insecure=allow_insecure)


def is_data_url(url: str) -> bool:
    """Whether ``url`` holds its content itself, so that nothing is fetched for it."""
    return url[:5].lower() == "data:"


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
