"""What every answer means for the bytes that are kept, and whether another try may help.

Tries again until a file is whole and verified, or no try brings anything new. Trusts kept bytes only where
the final hash covers them, or the server says that they are still those of its file.
"""

from __future__ import annotations

import email.utils
import threading
from pathlib import Path

from studio_worker.errors import DownloadCancelled, DownloadError, DownloadRefused
from studio_worker.logs import safe_url
from studio_worker.staging import Origin, Progress, Staged, boot_id
from studio_worker.transport import Answer, Policy, UnwantedStatus

_RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_FRESH_STARTS = 2
"""So often in one call may a download that starts from nothing again count its bytes as new ones."""


class Attempts:
    """The tries of one download.

    Args:
        sha256: lower-case hex.
        size: exact length in bytes.
    """

    def __init__(
        self,
        *,
        url: str,
        dest: Path,
        sha256: str | None,
        size: int | None,
        progress: Progress,
        cancel: threading.Event,
        policy: Policy,
    ) -> None:
        self.url = url
        self.name = safe_url(url)
        self.dest = dest
        self.sha256 = sha256
        self.size = size
        self.progress = progress
        self.cancel = cancel
        self.policy = policy
        self.resumed_from = 0
        """How many bytes of an earlier call are in the file."""
        self.is_doubtful = False
        """Whether bytes of several answers, or of one without a length, are put together."""

    def run(self, staged: Staged) -> int:
        """Try until the file is whole, nothing new comes any more, or another try would not help."""
        if self.may_resume(staged, in_new_process=True):
            staged.hash_kept(self.progress)
            self.resumed_from = staged.length
        else:
            staged.discard()
        most = staged.length
        fresh_starts = 0
        delays = iter(self.policy.delays_s)
        worst: DownloadError | None = None
        while True:
            try:
                return self._try_once(staged)
            except (DownloadCancelled, DownloadRefused):
                raise
            except DownloadError as error:
                if error.reason in {"size mismatch", "sha256 mismatch"}:
                    # What was put together may be what is wrong: once more, from nothing.
                    is_first = self.is_doubtful and fresh_starts < _FRESH_STARTS
                    self._discard(staged)
                    if not is_first:
                        raise
                    fresh_starts, most = _FRESH_STARTS, 0
                    continue
                if not _is_passing(error):
                    raise
                # A broken body says more than the refused connection that may follow it.
                if worst is None or error.reason == "streaming body":
                    worst = error
                if staged.length < most and fresh_starts < _FRESH_STARTS:
                    fresh_starts, most = fresh_starts + 1, 0
                if staged.length > most:
                    most = staged.length
                    delays = iter(self.policy.delays_s)
                delay = next(delays, None)
                if delay is None:
                    raise worst from None
                asked_s = error.retry_after_s if isinstance(error, UnwantedStatus) else None
                if self.policy.wait(self.cancel, min(asked_s or delay, self.policy.retry_after_cap_s)):
                    raise DownloadCancelled(self.name) from None

    def _try_once(self, staged: Staged) -> int:
        """One request; returns the length of the verified, renamed file."""
        if not self.may_resume(staged) or (self.size is not None and staged.length > self.size):
            self._discard(staged)
        have = staged.length
        self.is_doubtful = have > 0
        known = self._known(staged)
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and known.validator:
            headers["If-Range"] = known.validator
        with Answer(self.url, headers, self.policy, self.cancel) as answer:
            if answer.status == 416 and have:
                return self._finish_unsatisfiable(staged, answer)
            if answer.status == 206 and have:
                total = self._continued_total(staged, answer)
            elif answer.status == 200:
                if have:
                    self._discard(staged)
                    self.is_doubtful = False
                total = answer.length
            else:
                raise answer.unwanted()
            if None not in {total, self.size} and total != self.size:
                raise self._size_error(total, self.size)
            # An answer to If-Range need not repeat the validator that it confirms.
            validator = _validator(answer) or (known.validator if answer.status == 206 else None)
            staged.note(Origin(self.name, validator, total, boot_id()))
            return self._receive(staged, answer, total)

    def _receive(self, staged: Staged, answer: Answer, total: int | None) -> int:
        if total is None:
            total = self.size
        if total is None and not answer.is_chunked:
            self.is_doubtful = True
            if self.sha256 is None:
                raise DownloadRefused(
                    "size mismatch",
                    f"GET {self.name}: size mismatch: neither the server nor the model's source says how "
                    "long the file is or what it hashes to: a broken one would look like a whole one",
                )
        for chunk in answer.chunks():
            staged.append(chunk)
            if total is not None and staged.length > total:
                raise self._size_error(staged.length, total)
            self.progress(staged.length, total)
        if total is not None and staged.length < total:
            raise self.broken(f"{staged.length} of {total} bytes arrived")
        return self._commit(staged)

    def _continued_total(self, staged: Staged, answer: Answer) -> int | None:
        """The length of the whole file, from an answer that continues the kept bytes."""
        first, total = answer.content_range
        known = self._known(staged).total
        if first != staged.length:
            self._discard(staged)
            raise self.broken("the server sent another range than was asked for")
        if None not in {total, known} and total != known:
            self._discard(staged)
            raise self.broken("the file has changed on the server")
        return total if total is not None else known

    def _finish_unsatisfiable(self, staged: Staged, answer: Answer) -> int:
        """There is nothing behind the kept bytes: they are whole, or those of another file."""
        _, total = answer.content_range
        if total is None:
            total = self._known(staged).total or self.size
        if self.sha256 is None and total != staged.length:
            self._discard(staged)
            raise self.broken("the file has changed on the server")
        return self._commit(staged)

    def _commit(self, staged: Staged) -> int:
        if self.size not in {None, staged.length}:
            raise self._size_error(staged.length, self.size)
        if self.sha256 not in {None, digest := staged.hexdigest()}:
            raise DownloadError(
                "sha256 mismatch", f"GET {self.name}: sha256 mismatch: {digest} instead of {self.sha256}"
            )
        staged.commit(self.dest)
        return staged.length

    def may_resume(self, staged: Staged, *, in_new_process: bool = False) -> bool:
        """Kept bytes are of use where the final hash covers them, or the server can say they are current.

        In the second case nothing covers what a power cut did to them.
        """
        if self.sha256 is not None:
            return True
        known = self._known(staged)
        return known.validator is not None and not (in_new_process and known.boot != boot_id())

    def _known(self, staged: Staged) -> Origin:
        """What is noted of the kept bytes, if they come from this URL."""
        origin = staged.origin
        return origin if origin is not None and origin.url == self.name else Origin(self.name)

    def _discard(self, staged: Staged) -> None:
        staged.discard()
        self.resumed_from = 0

    def broken(self, what: str) -> DownloadError:
        return DownloadError("streaming body", f"GET {self.name}: streaming body: {what}")

    def _size_error(self, length: int | None, wanted: int | None) -> DownloadError:
        return DownloadError(
            "size mismatch", f"GET {self.name}: size mismatch: {length} bytes instead of {wanted}"
        )


def _validator(answer: Answer) -> str | None:
    """What ``If-Range`` may hold: a strong ETag, else a date that is strong (RFC 9110, 8.8 and 13.1.5)."""
    etag = answer.headers.get("ETag", "")
    if etag:
        return etag if etag.startswith('"') else None
    modified = answer.headers.get("Last-Modified", "")
    try:
        age = email.utils.parsedate_to_datetime(answer.headers.get("Date", ""))
        age_s = (age - email.utils.parsedate_to_datetime(modified)).total_seconds()
    except (ValueError, TypeError):
        return None
    # A file that changed twice within the second has one date for two contents.
    return modified if age_s >= 1 else None


def _is_passing(error: DownloadError) -> bool:
    """Whether another try may help: the one place that decides."""
    if isinstance(error, DownloadRefused):
        return False
    if error.reason == "non-success status":
        return error.status in _RETRIED_STATUSES
    return error.reason in {"request error", "streaming body"}
