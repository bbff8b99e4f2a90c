"""Which URLs may be used at all, and how they are shown. Resolves no names: that is addresses.py's."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit, urlunsplit


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


def safe_url(url: str) -> str:
    """``url`` without user info, query and fragment, as it may be logged.

    An address whose user info cannot be told for certain (a password with ``/`` in it) is not shown at all.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where the port is not a number
    except ValueError:
        return "[unreadable url]"
    host = parts.netloc.rpartition("@")[2]
    if not parts.scheme or not host or "@" in f"{parts.path}{parts.query}{parts.fragment}":
        return "[unreadable url]"
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
