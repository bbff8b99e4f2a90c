"""A file could not be fetched, verified or kept; here is decided which of that may pass."""

from __future__ import annotations

from typing import ClassVar

from studio_worker.errors.base import StudioWorkerError

_PASSING_STATUSES = frozenset({408, 425, 429})
_LASTING_STATUSES = frozenset({501, 505, 506, 508, 510, 511})
"""Of the server's errors those that say how it is set up; RFC 9110, and 511 is a portal to sign in at."""
_GONE_STATUSES = frozenset({404, 410})
_MISMATCHES = frozenset({"sha256 mismatch", "size mismatch"})


class DownloadError(StudioWorkerError):
    """A file could not be fetched or verified.

    Args:
        reason: ``request error``, ``non-success status``, ``streaming body``, ``size mismatch`` or
            ``sha256 mismatch``.
        message: the sentence, without secrets (URLs without query strings).
        status: the HTTP status, where there is one.
    """

    exit_status: ClassVar[int] = 74  # EX_IOERR

    def __init__(self, reason: str, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status

    @property
    def is_final_here(self) -> bool:
        """Whether asking again would bring the same: the one place that decides."""
        if self.status is not None:
            # A 5xx that nobody knows counts as a 500 (RFC 9110, 15): a CDN has its own from 520 on.
            is_passing = self.status in _PASSING_STATUSES or self.status >= 500
            return not is_passing or self.status in _LASTING_STATUSES
        return self.reason in _MISMATCHES

    @property
    def is_jobs_fault(self) -> bool:
        """Whether no worker gets the file: its host has none, or another one than the studio registered."""
        if self.status is not None:
            # All others depend on who asks: a token that this box lacks, a proxy, the country it is in.
            return self.status in _GONE_STATUSES
        return self.reason in _MISMATCHES


class DownloadRefused(DownloadError):
    """A request that must not be made, or an answer that would be the same on another try here.

    Args:
        is_jobs_fault: whether it is the address itself that no worker may use.
    """

    def __init__(self, reason: str, message: str, *, is_jobs_fault: bool = False) -> None:
        super().__init__(reason, message)
        self._is_jobs_fault = is_jobs_fault

    @property
    def is_final_here(self) -> bool:
        return True

    @property
    def is_jobs_fault(self) -> bool:
        return self._is_jobs_fault


class PageInPlace(DownloadError):
    """A web page came in the place of the file: from a captive portal, or a login that this box lacks."""

    @property
    def is_jobs_fault(self) -> bool:
        return False


class DownloadCancelled(DownloadError):
    """The caller asked the download to stop; the bytes so far are kept for the next try."""

    def __init__(self, url: str) -> None:
        super().__init__("cancelled", f"GET {url}: stopped before its end")


class StoreError(DownloadError):
    """The models folder cannot hold or give what is asked of it."""

    def __init__(self, message: str) -> None:
        super().__init__("store", message)
