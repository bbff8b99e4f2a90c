"""Input pictures of a job: from the address that a task names to bytes in memory.

By the downloader's rules for addresses, redirects, certificates and proxies, and stricter ones of its own:
no private networks, a limit of bytes and of time. A ``data:`` address holds them itself. What the bytes are
is judged where they are decoded.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import threading
import time
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from studio_worker.download import fetch_bytes
from studio_worker.errors import DownloadCancelled, DownloadError, DownloadRefused
from studio_worker.network.addresses import Networks, server_of
from studio_worker.network.uplink import Uplink
from studio_worker.network.urls import is_data_url
from studio_worker.transfer.policy import Policy

MAX_BYTES = 64 * 1024 * 1024

MAX_S = 120.0
"""For one input, all tries together: below the worker's own limit for a step, so that a server that drips
fails the job and not the worker."""

_DELAYS_S = (0.5, 2.0)


def input_fetcher(
    policy: Policy, studio_url: str, *, max_s: float = MAX_S
) -> Callable[[str, threading.Event], bytes]:
    """What fetches input pictures for the worker.

    Args:
        policy: the downloader's. Where it allows insecure addresses, private networks are allowed too.
        studio_url: the studio's address; its host and port are trusted in whatever network they are.

    The function raises DownloadError and, when its event is set, DownloadCancelled.
    """
    networks = Networks(private=policy.allow_insecure, trusted=frozenset({server_of(studio_url)}))
    # They are small, and a job waits for them: they give way to no upload.
    guarded = dataclasses.replace(policy, networks=networks, uplink=Uplink())

    def fetch(url: str, cancel: threading.Event) -> bytes:
        if is_data_url(url):
            return _held(url)
        until = time.monotonic() + max_s
        for delay_s in (*_DELAYS_S, None):
            try:
                return fetch_bytes(url, max_bytes=MAX_BYTES, policy=guarded, cancel=cancel, until=until)
            except DownloadCancelled:
                raise
            except DownloadError as error:
                if delay_s is None or error.is_final_here or time.monotonic() + delay_s > until:
                    raise
            policy.wait(cancel, delay_s)
        raise AssertionError("the last try returns or raises")

    return fetch


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def _held(url: str) -> bytes:
    """What a ``data:`` address holds (RFC 2397), read as forgivingly as browsers do (WHATWG's Fetch). No
    error quotes it.

    Raises:
        DownloadRefused: it is none, or holds too much.
    """
    head, comma, text = url.partition(",")
    if not comma:
        raise _refused("a data: address without a comma")
    held = unquote_to_bytes(text)
    if head.rstrip().lower().endswith(";base64"):
        digits = b"".join(held.split()).rstrip(b"=").translate(_URL_SAFE)
        try:
            held = base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
        except binascii.Error:
            raise _refused("a data: address that is not base64, as it says") from None
    if len(held) > MAX_BYTES:
        raise _refused(f"a data: address of more than {MAX_BYTES} bytes")
    return held


def _refused(what: str) -> DownloadRefused:
    return DownloadRefused("request error", f"an input picture is {what}", is_jobs_fault=True)
