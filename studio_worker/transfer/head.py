"""What the head of an answer says: how long it is, which range, what vouches for it, how long to wait."""

from __future__ import annotations

import email.utils
from collections.abc import Mapping

import requests

from studio_worker.errors import DownloadError
from studio_worker.network.retry_after import retry_after_s


class UnwantedStatus(DownloadError):
    """The server answered with something else than the file.

    Args:
        retry_after_s: seconds the server asked to wait, where it did.
    """

    def __init__(self, name: str, status: int, retry_after_s: float | None) -> None:
        super().__init__("non-success status", f"GET {name} -> {status}", status=status)
        self.retry_after_s = retry_after_s


class Head:
    """The status line and headers of an answer."""

    def __init__(self, name: str, response: requests.Response) -> None:
        self.name = name
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers

    @property
    def length(self) -> int | None:
        """``Content-Length``, where it is given and counts; said twice in a line it counts once."""
        given = {each.strip() for each in self.headers.get("Content-Length", "").split(",")}
        return None if self.is_chunked or len(given) > 1 else _number(given.pop())

    @property
    def is_chunked(self) -> bool:
        """Whether the body says itself where it ends."""
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    @property
    def content_range(self) -> tuple[int | None, int | None]:
        """``Content-Range`` as (first byte, length of the whole file); ``None`` for what is not given."""
        unit, _, rest = self.headers.get("Content-Range", "").partition(" ")
        span, _, whole = rest.partition("/")
        first = span.partition("-")[0]
        if unit != "bytes":
            return None, None
        return _number(first), _number(whole)

    @property
    def validator(self) -> str | None:
        """What ``If-Range`` may hold: a strong ETag, else a date that is strong (RFC 9110, 8.8, 13.1.5)."""
        etag = self.headers.get("ETag", "")
        if etag:
            return etag if etag.startswith('"') else None
        modified = self.headers.get("Last-Modified", "")
        try:
            age = email.utils.parsedate_to_datetime(self.headers.get("Date", ""))
            age_s = (age - email.utils.parsedate_to_datetime(modified)).total_seconds()
        except (ValueError, TypeError):
            return None
        # A file that changed twice within the second has one date for two contents.
        return modified if age_s >= 1 else None

    def unwanted(self) -> UnwantedStatus:
        """The error for a status that the caller cannot use."""
        return UnwantedStatus(self.name, self.status, retry_after_s(self.headers))


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 20 else None
