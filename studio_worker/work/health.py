"""What the last jobs say of this box: what it takes no jobs of for a while, and what it cannot serve at all.

Carries the rule of breaker.py: waits for the ends of pauses on a thread of its own, has the device tried out
then, and says in the status line and the log what is held back and why. A device that fails one try after the
other ends the process, for systemd to start a new one. Judges no error: whose fault it was, the error says.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

from studio_worker.errors import DeviceError, DownloadError, NotServed, StudioWorkerError
from studio_worker.jobs import ImageTask, Job
from studio_worker.models import ModelSource
from studio_worker.report.snapshot import HealthFacts, HeldFacts
from studio_worker.work.breaker import FAILED_TRIES, FAILURES, Breaker, Hold, Refusal

log = logging.getLogger(__name__)

_REMEMBERED_SOURCES = 200
_REASON_CHARS = 300
_MODEL_CHARS = 100
"""Both may come from the studio; what is shown is bounded."""


class Health:
    """The health of one box. Safe from any thread.

    Args:
        note: gets what the operator should know; empty = nothing any more.
        try_device: has the device compute, and returns what is wrong with it, or an empty string.
        end: called where the device stays unusable for this process.
        stop: ends the waiting.
    """

    def __init__(
        self,
        note: Callable[[str], None],
        *,
        try_device: Callable[[], str],
        end: Callable[[DeviceError], None],
        stop: threading.Event,
    ) -> None:
        self._note = note
        self._try_device = try_device
        self._end = end
        self._stop = stop
        self._breaker = Breaker()
        self._lock = threading.Lock()
        self._mending: threading.Thread | None = None
        self._is_trying = False
        self._not_served: OrderedDict[Hashable, str] = OrderedDict()

    # --- what happened ---

    def made(self, job: Job) -> None:
        """The picture of ``job`` is made."""
        with self._lock:
            self._breaker.made(job.model)
        self._say()

    def failed(self, job: Job, error: Exception) -> None:
        """``job`` failed; what no worker can do says nothing of this one."""
        if isinstance(error, NotServed):
            with self._lock:
                self._not_served[_kind(job.source, job.task)] = str(error)
                if len(self._not_served) > _REMEMBERED_SOURCES:
                    self._not_served.popitem(last=False)
            return
        if isinstance(error, StudioWorkerError) and error.is_jobs_fault:
            return
        with self._lock:
            before = self._breaker.holds()
            self._breaker.failed(job.model, _reason(error), fetching=isinstance(error, DownloadError))
            after = self._breaker.holds()
        self._held(set(after) - set(before))

    def crashed(self, times: int) -> None:
        """So many processes in a row, up to this one, ended in the middle of a job."""
        with self._lock:
            self._breaker.crashed(times)
            holds = self._breaker.holds()
        self._held(set(holds))

    # --- what follows ---

    def refusal(self, model: str, source: ModelSource, task: ImageTask, *, fetches: bool) -> Refusal | None:
        """Why a job should not be taken now, or ``None``.

        Args:
            fetches: whether something has to be fetched for it.
        """
        with self._lock:
            if reason := self._not_served.get(_kind(source, task)):
                return Refusal(reason, is_for_now=False)
            if self._is_trying:
                return Refusal("the device is being tried out", is_for_now=True)
            return self._breaker.refusal(model, fetches=fetches)

    def facts(self) -> HealthFacts:
        """For status and metrics."""
        with self._lock:
            now, holds = time.monotonic(), self._breaker.holds()
            return HealthFacts(
                failures=self._breaker.failures,
                failed_tries=self._breaker.failed_tries,
                held=tuple(
                    HeldFacts(
                        model=hold.model,
                        failures=hold.failures,
                        reason=hold.reason,
                        until_at=time.time() + hold.until - now,
                        only_fetching=hold.only_fetching,
                    )
                    for hold in holds
                ),
            )

    # --- in here ---

    def _held(self, new: set[Hold]) -> None:
        for hold in new:
            log.warning(
                "jobs are held back",
                extra={
                    "op": "health",
                    "model": hold.model or "all",
                    "failures": hold.failures,
                    "reason": hold.reason,
                    "only_fetching": hold.only_fetching,
                },
            )
        with self._lock:
            if new and self._mending is None:
                self._mending = threading.Thread(target=self._mend, name="health", daemon=True)
                self._mending.start()
        self._say()

    def _mend(self) -> None:
        """Wait for the end of each pause, and let jobs through again where the device works."""
        while True:
            with self._lock:
                wait_s = self._breaker.wait_s()
                if wait_s is None:
                    self._mending = None
                    return
            if self._stop.wait(wait_s):
                return
            with self._lock:
                self._is_trying = self._breaker.needs_try()
            self._say()
            problem = self._tried() if self._is_trying else None
            with self._lock:
                self._is_trying = False
                if problem is not None:
                    self._breaker.tried(problem)
                self._breaker.lift()
                failed_tries = self._breaker.failed_tries
            if self._stop.is_set():
                return
            self._say()
            if failed_tries >= FAILED_TRIES:
                self._end(DeviceError(f"jobs fail, and the device fails one try after the other: {problem}"))
                return

    def _tried(self) -> str:
        try:
            problem = self._try_device()
        except Exception as error:  # whatever it is, what is held back must not be so for ever
            log.exception("device could not be tried out", extra={"op": "health"})
            problem = f"it could not be tried out ({type(error).__name__})"
        log.info("device tried out after failed jobs", extra={"op": "health", "problem": problem})
        return problem

    def _say(self) -> None:
        with self._lock:
            self._note(self._text())

    def _text(self) -> str:
        if self._is_trying:
            return "trying out the device, since jobs failed"
        holds = self._breaker.holds()
        if not holds:
            failures = self._breaker.failures
            return f"the last {failures} jobs failed: {self._breaker.reason}" if failures >= FAILURES else ""
        hold, *others = holds
        if hold.model is None:
            what = "jobs that need downloads" if hold.only_fetching else "jobs"
        else:
            what = f"jobs of {hold.model[:_MODEL_CHARS]}"
        until = time.strftime("%H:%M:%S", time.localtime(time.time() + hold.until - time.monotonic()))
        more = f" (and {len(others)} more)" if others and hold.model is not None else ""
        return f"no {what}{more} until {until}: the last {hold.failures} failed: {hold.reason}"


def _reason(error: Exception) -> str:
    """Of our own errors the text; of others, which may quote the prompt, the kind."""
    if isinstance(error, StudioWorkerError):
        return str(error)[:_REASON_CHARS]
    return f"internal error: {type(error).__name__}"


def _kind(source: ModelSource, task: ImageTask) -> Hashable:
    """What jobs have in common of which one was found to be not served: the source, and what it is given."""
    files = tuple((file.role, file.sha256 or file.url) for file in source.files)
    given = tuple(url is not None for url in (task.init_image_url, task.mask_url, task.ref_image_url))
    return source.engine, files, given
