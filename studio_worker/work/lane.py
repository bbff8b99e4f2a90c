"""One job after the other, each through all its stages: a lane, on a thread of its own.

Asks the source for a job, the store for files, the engine for a picture, and gives the picture to the
outbox. It knows none of them: what it needs of each is declared in ports.py. Only what needs the device is
done elsewhere, in the lane's turn (turns.py); files, inputs and their decoding, encoding and keeping are done
here. One bad job never ends a lane; a lost device does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial

from studio_worker.box.process import give_memory_back
from studio_worker.context import called
from studio_worker.engine import Inputs, Made, Request
from studio_worker.errors import (
    DeviceError,
    DownloadCancelled,
    DownloadError,
    FileDamaged,
    JobCancelled,
    JobError,
    JobImpossible,
)
from studio_worker.jobs import Cancel, Job, Picture
from studio_worker.models import LocalFile
from studio_worker.wording import frames
from studio_worker.work.keeping import release_all
from studio_worker.work.ports import Ports
from studio_worker.work.stride import Stride
from studio_worker.work.turns import Turns

log = logging.getLogger(__name__)


class Lane:
    """The loop of one lane.

    Args:
        ports: all that it works with.
        turns: where it waits for the device.
        step_timeout_s: how long one step, or one gap between two signs of progress, may take; asked each
            time.
    """

    def __init__(self, ports: Ports, turns: Turns, step_timeout_s: Callable[[], float]) -> None:
        self._source = ports.source
        self._claims = ports.claims
        self._files = ports.files
        self._engines = ports.engines
        self._in_hand = ports.in_hand
        self._results = ports.results
        self._reports = ports.reports
        self._health = ports.health
        self._fetch = ports.fetch
        self._turns = turns
        self._stride = Stride(step_timeout_s)
        self._guard = threading.Lock()
        self._cancel = Cancel()
        self._cancel_download = threading.Event()
        self._turn: Future[Made] | None = None
        self._ending: str | None = None
        self._is_making = False
        self._painting_at = 0.0

    def run(self) -> None:
        """Work until the source has no more jobs.

        Raises:
            DeviceError: the device is lost; its job was reported and stays noted.
        """
        while (job := self._source.take(self._rest)) is not None:
            with called(job_id=job.job_id, model=job.model):
                self._do(job)

    def _rest(self) -> None:
        with contextlib.suppress(CancelledError):  # the device is given to nobody any more
            self._turns.ask(partial(release_all, self._engines)).result()

    def hand_back(self, reason: str) -> None:
        """Stop the job in hand at its next step, and any later one: the process is ending.

        Safe from any thread.
        """
        with self._guard:
            self._ending = self._ending or reason
        self._stop_job(reason)

    def leave(self, reason: str) -> None:
        """As :meth:`hand_back`, and take no more jobs."""
        self.hand_back(reason)
        self._source.close()

    def _stop_job(self, reason: str) -> None:
        """Stop the job in hand, if there is one, at its next step; it is reported as retryable."""
        with self._guard:
            self._cancel.set(reason)
            self._cancel_download.set()
            if self._turn is not None:
                self._turn.cancel()  # where it waits; at the device the engine looks at the other one

    def is_stuck(self) -> bool:
        """Whether the job in hand has shown no progress for longer than its limit."""
        return self._stride.is_too_long()

    def _do(self, job: Job) -> None:
        has_crashed = False
        self._stride.moved()
        self._reports.job_began(job.job_id, job.model)
        with self._guard:
            self._cancel, self._cancel_download = Cancel(), threading.Event()
        if self._ending is not None:  # also where it came between the last line and this one
            self._stop_job(self._ending)
        try:
            self._note(job)
            made, timings_s = self._made(job)
            self._stride.moved()
            picture = made.encoded()
            del made
            self._keep(job, picture, {**timings_s, **picture.timings_s})
            log.debug("picture made", extra={"op": "job"})
            self._reports.job_made()
            self._health.made(job)
        except JobCancelled as error:
            self._report(job, str(error), retryable=True, handed_back=True)
            if self._ending is None:  # a step that took too long
                self._health.failed(job, error)
        except DownloadCancelled:
            self._report(job, self._cancel.reason, retryable=True, handed_back=True)
        except (JobError, DownloadError) as error:
            self._fail(job, self._judged(error))
        except DeviceError as error:
            # What the engine was at work on may have killed it: the note stays, for the next start to count.
            has_crashed = self._is_making
            self._report(job, str(error), retryable=True)
            raise
        except Exception as error:
            # The one broad catch: whatever one job did to a library must not end the others.
            # Logged by its frames, without its text: a library's error may quote the prompt.
            log.error(
                "job crashed",
                extra={
                    "op": "job",
                    "error": type(error).__name__,
                    "traceback": frames(error),
                },
            )
            self._report(job, f"internal error: {type(error).__name__}", retryable=True)
            self._health.failed(job, error)
        finally:
            self._stride.end()
            self._is_making = False
            if not has_crashed:
                self._in_hand.end()
            if self._turns.is_free():  # else whoever has the device does so afterwards
                give_memory_back()
            self._source.finished(job)
            # Delivery starts only now: the studio answers it with the next offer, and a desk that is not
            # clear yet would have to refuse that one as busy.
            self._results.wake()

    def _judged(self, error: JobError | DownloadError) -> JobError | DownloadError:
        """A file that is what the studio registered, and makes no sense, is the job's fault."""
        try:
            if isinstance(error, FileDamaged) and self._files.is_as_registered(
                error.path, self._stride.moved, self._cancel_download
            ):
                return JobImpossible(str(error))
        except DownloadError as problem:  # stopped, or a disk that fails: nobody knows
            log.warning("file could not be read anew", extra={"op": "job", "error": str(problem)})
        return error

    def _fail(self, job: Job, error: JobError | DownloadError) -> None:
        """A method, since a frame that the error went through and that names it would keep both alive."""
        self._report(job, str(error), retryable=not error.is_jobs_fault)
        self._health.failed(job, error)

    def _note(self, job: Job) -> None:
        try:
            self._in_hand.begin(job)
        except OSError as error:
            raise _disk_error("the job cannot be noted", error) from error

    def _keep(self, job: Job, picture: Picture, timings_s: Mapping[str, float]) -> None:
        try:
            self._results.add(job, picture, timings_s)
        except OSError as error:
            raise _disk_error("the finished picture cannot be kept", error) from error

    def _made(self, job: Job) -> tuple[Made, dict[str, float]]:
        """The pixels, and how long the stages before the device took. The inputs are gone by then."""
        began = time.monotonic()
        with self._files.taken(
            job.model, job.source.files, progress=self._stride.moved, cancel=self._cancel_download
        ) as files:
            request = self._brought(job, files)
            there = time.monotonic()
            self._reports.job_prepares()
            request = self._engines.prepared(job.source, request, self._cancel.check)
            ready = time.monotonic()
            self._cancel.check()
            is_free = self._turns.is_free()
            self._reports.job_waits()
            made = self._at_the_device(partial(self._paint, job, request), job.model)
            waited_s = {} if is_free else {"turn": self._painting_at - ready}  # for another lane's picture
            before_s = {"wait": began - job.taken_at, "files": there - began, "prepare": ready - there}
            return made, before_s | waited_s

    def _brought(self, job: Job, files: tuple[LocalFile, ...]) -> Request:
        """All that the engine needs, its input pictures as fetched."""
        inputs = Inputs(
            init_image=self._fetched(job.task.init_image_url),
            mask=self._fetched(job.task.mask_url),
            ref_image=self._fetched(job.task.ref_image_url),
        )
        request = Request(
            job_id=job.job_id,
            model=job.model,
            task=job.task,
            defaults=job.source.cli_defaults,
            files=files,
            inputs=inputs,
        )
        self._stride.moved()
        return request

    def _at_the_device(self, paint: Callable[[], Made], model: str) -> Made:
        """What ``paint`` gives when it is this lane's turn. What is waited for meanwhile is not this job."""
        self._stride.end()
        turn = self._turns.ask(paint, model)
        with self._guard:
            self._turn = turn
        if self._cancel.is_set:  # also where it came between those lines
            turn.cancel()
        try:
            return turn.result()
        except CancelledError:
            raise JobCancelled(self._cancel.reason or "the worker is stopping") from None
        finally:
            with self._guard:
                self._turn = None
            # Or it, what it raised and this frame keep each other, and the picture's tensors with them.
            del turn

    def _paint(self, job: Job, request: Request) -> Made:
        """This lane's turn: on the thread that has the device."""
        self._painting_at = time.monotonic()
        self._stride.moved()
        self._in_hand.at_device()
        self._reports.job_loads()
        engine = self._engines.for_source(job.source)
        self._is_making = True
        return engine.make(request, self._stepped, self._cancel)

    def _fetched(self, url: str | None) -> bytes | None:
        self._stride.moved()  # each input has its own limit of time
        return None if url is None else self._fetch(url, self._cancel_download)

    def _stepped(self, done: int, total: int) -> None:
        """One step is done. A step that took too long is the job's last: the device is hardly usable for it.

        The first step is no step alone: it comes after the last of the model was loaded.
        """
        took_s, limit_s = self._stride.took_s(), self._stride.limit_s
        self._stride.moved()
        if done == 0:
            return
        self._reports.job_stepped(done, total)
        if done > 1 and took_s > limit_s:
            self._stop_job(
                f"step {done} of {total} took {took_s:.0f} s, longer than step_timeout_s ({limit_s:g} s)"
            )

    def _report(self, job: Job, error: str, *, retryable: bool, handed_back: bool = False) -> None:
        log.error(
            "job failed",
            extra={
                "op": "job",
                "outcome": "failed",
                "error": error,
                "retryable": retryable,
                "elapsed_ms": round((time.monotonic() - job.taken_at) * 1000),
            },
        )
        self._claims.report_failure(job.job_id, error, retryable=retryable)
        self._reports.job_failed(job.job_id, job.model, error, retryable=retryable, handed_back=handed_back)


def _disk_error(what: str, error: OSError) -> JobError:
    return JobError(f"{what}: {error.strerror}")
