"""Input pictures of a job: from the address that a task names to bytes in memory.

By the downloader's rules for addresses, redirects, certificates and proxies, and stricter ones of its own:
no private networks, a limit of bytes and of time. What the bytes are is judged where they are decoded.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from studio_worker.download import fetch_bytes
from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.networks import Networks
from studio_worker.policy import Policy

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
        studio_url: the studio's address; its host is trusted in whatever network it is.

    The function raises DownloadError and, when its event is set, DownloadCancelled.
    """
    host = (urlsplit(studio_url).hostname or "").rstrip(".")
    networks = Networks(private=policy.allow_insecure, trusted_hosts=frozenset({host} - {""}))
    guarded = dataclasses.replace(policy, networks=networks)

    def fetch(url: str, cancel: threading.Event) -> bytes:
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
