"""What every answer means for the bytes that are kept, and whether another try may help.

Tries again until a file is whole and verified, or no try brings anything new. Trusts kept bytes only where
the final hash covers them, or the server says that they are still those of its file.
"""

from __future__ import annotations

import http
import logging
import threading
from pathlib import Path

from studio_worker.errors import DownloadCancelled, DownloadError, DownloadRefused, PageInPlace
from studio_worker.formats import header_problem, impostor, is_page
from studio_worker.transfer.answer import Answer, UnwantedStatus
from studio_worker.transfer.asking import Target
from studio_worker.transfer.policy import Policy
from studio_worker.transfer.range_reader import FileChanged
from studio_worker.transfer.ranges import PARALLEL_BYTES, Ranges
from studio_worker.transfer.staging import Origin, Progress, Staged

log = logging.getLogger(__name__)

_LIMITED_FACTOR = 20
"""Times the usual waits: 10 s, 20 s, 40 s, …"""
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
        reading: Progress,
        cancel: threading.Event,
        policy: Policy,
    ) -> None:
        self.url = url
        self.address = Target(url, is_hash_known=sha256 is not None)
        self.name = self.address.name
        self.dest = dest
        self.sha256 = sha256
        self.size = size
        self.progress = progress
        self.reading = reading
        self.cancel = cancel
        self.policy = policy
        self.is_single = False
        """Whether one connection must do: several have brought something wrong."""
        self.resumed_from = 0
        """How many bytes of an earlier call are in the file."""
        self.connections = 1
        """The largest number of connections that were used at once."""
        self.is_doubtful = False
        """Whether bytes of several answers, or of one without a length, are put together."""

    def run(self, staged: Staged) -> int:
        """Try until the file is whole, nothing new comes any more, or another try would not help."""
        if self.may_resume(staged):
            staged.hash_kept(self.reading)
            self.resumed_from = staged.kept
        else:
            staged.discard()
        most = staged.kept
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
                    self.is_single = True
                    continue
                if error.is_final_here:
                    raise
                # A broken body says more than the refused connection that may follow it.
                if worst is None or error.reason == "streaming body":
                    worst = error
                if staged.kept < most and fresh_starts < _FRESH_STARTS:
                    fresh_starts, most = fresh_starts + 1, 0
                if staged.kept > most:
                    most = staged.kept
                    delays = iter(self.policy.delays_s)
                delay = next(delays, None)
                if delay is None:
                    raise worst from None
                self._wait(error, delay)

    def _wait(self, error: DownloadError, delay_s: float) -> None:
        """Before another try; no such wait goes unsaid."""
        asked_s = None
        if error.status == http.HTTPStatus.TOO_MANY_REQUESTS:
            # It limits how often it is asked; whoever starts this process again and again must not undo that.
            delay_s *= _LIMITED_FACTOR
        if isinstance(error, UnwantedStatus):
            asked_s = error.retry_after_s
        wait_s = min(asked_s or delay_s, self.policy.retry_after_cap_s)
        why = str(error) if asked_s is None else f"{error}, asks to wait {asked_s:.0f} s"
        facts = {"op": "download", "url": self.name, "error": why, "retry_in_s": wait_s}
        # What somebody asks of us is for the operator to know; a connection that broke is nothing unusual.
        is_limited = asked_s is not None or error.status == http.HTTPStatus.TOO_MANY_REQUESTS
        log.log(logging.WARNING if is_limited else logging.INFO, "download has to wait", extra=facts)
        self.policy.on_wait(why, wait_s)
        if self.policy.wait(self.cancel, wait_s):
            raise DownloadCancelled(self.name)

    def _try_once(self, staged: Staged) -> int:
        """One request; returns the length of the verified, renamed file."""
        if not self.may_resume(staged) or (self.size is not None and staged.length > self.size):
            self._discard(staged)
        have, until = staged.length, staged.gap_end()
        is_partial = self.is_doubtful = staged.kept > 0
        known = self._known(staged)
        headers = {"Range": f"bytes={have}-{'' if until is None else until - 1}"} if is_partial else {}
        if is_partial and known.validator and self.sha256 is None:
            headers["If-Range"] = known.validator
        with Answer(self.address, headers, self.policy, self.cancel) as answer:
            if answer.status == 416 and is_partial:
                return self._finish_unsatisfiable(staged, answer)
            first, _ = answer.content_range
            # Some caches send the range that was asked for with the status of a whole answer.
            is_range = answer.status == 200 and first == have and self.sha256 is not None
            if is_partial and (answer.status == 206 or is_range):
                total = self._continued_total(staged, answer)
            elif answer.status == 200 and first:
                self._discard(staged)
                raise self.broken("the server sent a part of the file as the whole")
            elif answer.status == 200:
                if is_partial:
                    self._discard(staged)
                    self.is_doubtful = False
                    until = None
                total = answer.length
            else:
                raise answer.unwanted()
            if None not in {total, self.size} and total != self.size:
                raise self._size_error(total, self.size)
            # An answer to If-Range need not repeat the validator that it confirms.
            validator = answer.validator or (known.validator if answer.status == 206 else None)
            staged.note(Origin(self.name, validator, total))
            if total is not None:
                staged.check_room(total)
            if total is not None and (staged.is_split or total - staged.kept >= PARALLEL_BYTES):
                return self._receive_ranges(staged, answer, total, until or total)
            return self._receive(staged, answer, total)

    def _receive_ranges(self, staged: Staged, answer: Answer, total: int, until: int) -> int:
        """Large files: in place, over as many connections as are of use."""
        # The nodes of a CDN may have tags of their own: where a hash is known it decides.
        validator = None if self.sha256 else self._known(staged).validator
        is_single = (
            self.is_single
            or answer.headers.get("Accept-Ranges", "").lower() == "none"
            or not self.may_resume(staged)
        )
        ranges = Ranges(
            staged,
            address=self.address,
            total=total,
            validator=validator,
            policy=self.policy,
            cancel=self.cancel,
            progress=self.progress,
            is_single=is_single,
        )
        try:
            ranges.receive(answer.detach(), staged.length, until)
        except FileChanged:
            self._discard(staged)
            raise
        finally:
            self.connections = max(self.connections, ranges.largest)
            self.is_doubtful = self.is_doubtful or ranges.requests > 1
        return self._commit(staged)

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
        if (self.sha256 is None and total != staged.length) or staged.kept != staged.length:
            self._discard(staged)
            raise self.broken("the file has changed on the server")
        return self._commit(staged)

    def _commit(self, staged: Staged) -> int:
        if self.size not in {None, staged.length}:
            raise self._size_error(staged.length, self.size)
        if self.sha256 not in {None, digest := staged.hexdigest()}:
            what = impostor(staged.path)
            problem = f"this is {what}" if what else f"{digest} instead of {self.sha256}"
            raise self._wrong(staged, "sha256 mismatch", problem)
        if self.sha256 is None and (found := header_problem(staged.path, self.dest.name)):
            raise self._wrong(staged, "size mismatch", found)
        staged.commit(self.dest)
        return staged.length

    def may_resume(self, staged: Staged) -> bool:
        """Kept bytes are of use where the final hash covers them, or the server can say they are current."""
        return self.sha256 is not None or self._known(staged).validator is not None

    def _known(self, staged: Staged) -> Origin:
        """What is noted of the kept bytes, if they come from this URL."""
        origin = staged.origin
        return origin if origin is not None and origin.url == self.name else Origin(self.name)

    def _discard(self, staged: Staged) -> None:
        staged.discard()
        self.resumed_from = 0

    def broken(self, what: str) -> DownloadError:
        return DownloadError("streaming body", f"GET {self.name}: streaming body: {what}")

    def _wrong(self, staged: Staged, reason: str, problem: str) -> DownloadError:
        kind = PageInPlace if is_page(staged.path) else DownloadError
        return kind(reason, f"GET {self.name}: {reason}: {problem}")

    def _size_error(self, length: int | None, wanted: int | None) -> DownloadError:
        return DownloadError(
            "size mismatch", f"GET {self.name}: size mismatch: {length} bytes instead of {wanted}"
        )
