"""What every answer means for the bytes that are kept, and whether another try may help.

Tries again until a file is whole and verified, or no try brings anything new. Trusts kept bytes only where
the final hash covers them, or the server says that they are still those of its file.
"""

from __future__ import annotations

import http
import logging

from studio_worker.errors import DownloadCancelled, DownloadError, DownloadRefused
from studio_worker.transfer.answer import Answer
from studio_worker.transfer.asking import Target
from studio_worker.transfer.head import UnwantedStatus
from studio_worker.transfer.parallel.range_reader import FileChanged
from studio_worker.transfer.parallel.ranges import PARALLEL_BYTES, Ranges
from studio_worker.transfer.policy import Policy
from studio_worker.transfer.staging import Origin, Staged
from studio_worker.transfer.verifying import verify
from studio_worker.transfer.wanted import Caller, Wanted

log = logging.getLogger(__name__)

_LIMITED_FACTOR = 20
"""Times the usual waits: 10 s, 20 s, 40 s, …"""
_FRESH_STARTS = 2
"""So often in one call may a download that starts from nothing again count its bytes as new ones."""


class Attempts:
    """The tries of one download from one address."""

    def __init__(self, wanted: Wanted, caller: Caller, policy: Policy) -> None:
        self.wanted = wanted
        self.resumed_from = 0
        """How many bytes of an earlier call are in the file."""
        self.connections = 1
        """The largest number of connections that were used at once."""
        self._target = Target(wanted.url, is_hash_known=wanted.sha256 is not None)
        self._caller = caller
        self._policy = policy
        self._is_single = False
        """Whether one connection must do: several have brought something wrong."""
        self._is_doubtful = False
        """Whether bytes of several answers, or of one without a length, are put together."""

    def run(self, staged: Staged) -> None:
        """Try until the file is whole and verified, nothing new comes, or another try would not help."""
        if self.may_resume(staged):
            staged.hash_kept(self._caller.read_back)
            self.resumed_from = staged.kept
        else:
            staged.discard()
        most = staged.kept
        fresh_starts = 0
        delays = iter(self._policy.delays_s)
        worst: DownloadError | None = None
        while True:
            try:
                self._try_once(staged)
                verify(staged, self.wanted)
                return
            except (DownloadCancelled, DownloadRefused):
                raise
            except DownloadError as error:
                if error.reason in {"size mismatch", "sha256 mismatch"}:
                    # What was put together may be what is wrong: once more, from nothing.
                    is_first = self._is_doubtful and fresh_starts < _FRESH_STARTS
                    self._discard(staged)
                    if not is_first:
                        raise
                    fresh_starts, most = _FRESH_STARTS, 0
                    self._is_single = True
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
                    delays = iter(self._policy.delays_s)
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
        wait_s = min(asked_s or delay_s, self._policy.retry_after_cap_s)
        why = str(error) if asked_s is None else f"{error}, asks to wait {asked_s:.0f} s"
        facts = {"op": "download", "url": self.wanted.name, "error": why, "retry_in_s": wait_s}
        # What somebody asks of us is for the operator to know; a connection that broke is nothing unusual.
        is_limited = asked_s is not None or error.status == http.HTTPStatus.TOO_MANY_REQUESTS
        log.log(logging.WARNING if is_limited else logging.INFO, "download has to wait", extra=facts)
        self._policy.on_wait(why, wait_s)
        if self._policy.wait(self._caller.cancel, wait_s):
            raise DownloadCancelled(self.wanted.name)

    def _try_once(self, staged: Staged) -> None:
        """One request, and for a large file its ranges, until all of the file has come."""
        if not self.may_resume(staged) or (self.wanted.size is not None and staged.length > self.wanted.size):
            self._discard(staged)
        have, until = staged.length, staged.gap_end()
        is_partial = self._is_doubtful = staged.kept > 0
        known = self._known(staged)
        headers = {"Range": f"bytes={have}-{'' if until is None else until - 1}"} if is_partial else {}
        if is_partial and known.validator and self.wanted.sha256 is None:
            headers["If-Range"] = known.validator
        with Answer(self._target, headers, self._policy, self._caller.cancel) as answer:
            if answer.status == 416 and is_partial:
                self._check_unsatisfiable(staged, answer)
                return
            first, _ = answer.content_range
            # Some caches send the range that was asked for with the status of a whole answer.
            is_range = answer.status == 200 and first == have and self.wanted.sha256 is not None
            if is_partial and (answer.status == 206 or is_range):
                total = self._continued_total(staged, answer)
            elif answer.status == 200 and first:
                self._discard(staged)
                raise self.wanted.broken("the server sent a part of the file as the whole")
            elif answer.status == 200:
                if is_partial:
                    self._discard(staged)
                    self._is_doubtful = False
                    until = None
                total = answer.length
            else:
                raise answer.unwanted()
            if None not in {total, self.wanted.size} and total != self.wanted.size:
                raise self.wanted.wrong_size(total, self.wanted.size)
            # An answer to If-Range need not repeat the validator that it confirms.
            validator = answer.validator or (known.validator if answer.status == 206 else None)
            staged.note(Origin(self.wanted.name, validator, total))
            if total is not None:
                staged.check_room(total)
            if total is not None and (staged.is_split or total - staged.kept >= PARALLEL_BYTES):
                self._receive_ranges(staged, answer, total, until or total)
            else:
                self._receive(staged, answer, total)

    def _receive_ranges(self, staged: Staged, answer: Answer, total: int, until: int) -> None:
        """Large files: in place, over as many connections as are of use."""
        # The nodes of a CDN may have tags of their own: where a hash is known it decides.
        validator = None if self.wanted.sha256 else self._known(staged).validator
        is_single = (
            self._is_single
            or answer.headers.get("Accept-Ranges", "").lower() == "none"
            or not self.may_resume(staged)
        )
        ranges = Ranges(staged, self._target, self._policy, self._caller, total=total, validator=validator)
        if is_single:
            ranges.hold_at_one()
        try:
            ranges.receive(answer.detach(), staged.length, until)
        except FileChanged:
            self._discard(staged)
            raise
        finally:
            self.connections = max(self.connections, ranges.largest)
            self._is_doubtful = self._is_doubtful or ranges.requests > 1

    def _receive(self, staged: Staged, answer: Answer, total: int | None) -> None:
        if total is None:
            total = self.wanted.size
        if total is None and not answer.is_chunked:
            self._is_doubtful = True
            if self.wanted.sha256 is None:
                raise DownloadRefused(
                    "size mismatch",
                    f"GET {self.wanted.name}: size mismatch: neither the server nor the model's source says "
                    "how long the file is or what it hashes to: a broken one would look like a whole one",
                )
        for chunk in answer.chunks():
            staged.append(chunk)
            if total is not None and staged.length > total:
                raise self.wanted.wrong_size(staged.length, total)
            self._caller.moved(staged.length, total)
        if total is not None and staged.length < total:
            raise self.wanted.broken(f"{staged.length} of {total} bytes arrived")

    def _continued_total(self, staged: Staged, answer: Answer) -> int | None:
        """The length of the whole file, from an answer that continues the kept bytes."""
        first, total = answer.content_range
        known = self._known(staged).total
        if first != staged.length:
            self._discard(staged)
            raise self.wanted.broken("the server sent another range than was asked for")
        if None not in {total, known} and total != known:
            self._discard(staged)
            raise self.wanted.broken("the file has changed on the server")
        return total if total is not None else known

    def _check_unsatisfiable(self, staged: Staged, answer: Answer) -> None:
        """There is nothing behind the kept bytes: they are whole, or those of another file."""
        _, total = answer.content_range
        if total is None:
            total = self._known(staged).total or self.wanted.size
        if (self.wanted.sha256 is None and total != staged.length) or staged.kept != staged.length:
            self._discard(staged)
            raise self.wanted.broken("the file has changed on the server")

    def may_resume(self, staged: Staged) -> bool:
        """Kept bytes are of use where the final hash covers them, or the server can say they are current."""
        return self.wanted.sha256 is not None or self._known(staged).validator is not None

    def _known(self, staged: Staged) -> Origin:
        """What is noted of the kept bytes, if they come from this URL."""
        origin = staged.origin
        return origin if origin is not None and origin.url == self.wanted.name else Origin(self.wanted.name)

    def _discard(self, staged: Staged) -> None:
        staged.discard()
        self.resumed_from = 0
