"""The beginning of a file into memory: as much of it as its header has, by ranges, and how long it is.

For who has to know what a file is before it is fetched. Asks by the rules of downloads, but each address
once: whoever waits here has other things to do. What comes is no part of a download and is not verified.
"""

from __future__ import annotations

import http
import threading
from dataclasses import dataclass

from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.formats import header_bytes
from studio_worker.transfer.answer import Answer
from studio_worker.transfer.asking import Target
from studio_worker.transfer.policy import Policy

_FIRST_BYTES = 2**19
"""Of a safetensors file and of a GGUF file without a vocabulary that is all: headers have 50 to 400 kB."""

_LONGEST_BYTES = 10**13
"""No model's file is longer; a server may say anything."""


@dataclass(frozen=True)
class Beginning:
    """What a file begins with, its header at least, and how long all of it is."""

    content: bytes
    size_bytes: int


def fetch_beginning(url: str, policy: Policy, cancel: threading.Event, *, most_bytes: int) -> Beginning:
    """Ask for the beginning of a file, mirrors first.

    Args:
        most_bytes: a header that is longer is not fetched.

    Raises:
        DownloadError: there is no answer, or no range of a file with a header that could be a model's.
        DownloadCancelled: ``cancel`` was set.
    """
    *mirrors, itself = policy.ways(url)
    for way in mirrors:
        try:
            return _beginning(Target(way), policy, cancel, most_bytes)
        except DownloadCancelled:
            raise
        except DownloadError:
            continue
    return _beginning(Target(itself), policy, cancel, most_bytes)


def _beginning(target: Target, policy: Policy, cancel: threading.Event, most_bytes: int) -> Beginning:
    content, size, wanted = b"", None, min(_FIRST_BYTES, most_bytes)
    while True:
        more, whole = _range(target, len(content), wanted, policy, cancel)
        if size not in {None, whole}:
            raise _broken(target, "the file has changed on the server")
        content, size = content + more, whole
        needed = header_bytes(content)
        if needed is None or (needed > most_bytes <= len(content)):
            raise _broken(target, "it begins with no header that is read")
        if len(content) >= min(needed, size):
            return Beginning(content, size)
        wanted = min(needed, size, most_bytes)


def _range(
    target: Target, first: int, end: int, policy: Policy, cancel: threading.Event
) -> tuple[bytes, int]:
    """What the server gives of these bytes, at least one, and the length of the file."""
    headers = {"Range": f"bytes={first}-{end - 1}"}
    with Answer(target, headers, policy, cancel) as answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            raise answer.unwanted()
        begun, size = answer.content_range
        if begun != first or size is None or size > _LONGEST_BYTES:
            raise _broken(target, "the server sent another range than was asked for")
        found = bytearray()
        for chunk in answer.chunks():
            found += chunk
            if len(found) >= min(end, size) - first:
                break
        if not found:
            raise _broken(target, "nothing arrived")
        return bytes(found[: end - first]), size


def _broken(target: Target, what: str) -> DownloadError:
    return DownloadError("streaming body", f"GET {target.name}: {what}")
