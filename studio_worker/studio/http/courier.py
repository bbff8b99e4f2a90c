"""Emptying the outbox: one thread that uploads finished pictures until the studio has or refuses them.

Uploads do not hold up the next job, nor each other: a picture that the studio stumbles over waits by itself,
and only where the studio cannot be reached at all, or asks for patience, do all wait. One summary line a
finished job is logged here, when its last stage, the upload, is known.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from studio_worker.errors import DeliveryRefused, RefusedByStudio, StudioUnavailable
from studio_worker.spool.delivery import Delivery
from studio_worker.spool.outbox import Outbox
from studio_worker.studio.backoff import Backoff
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import Credentials

log = logging.getLogger(__name__)


class Reports(Protocol):
    """Who is told what becomes of deliveries. Stages are seconds."""

    def upload_delivered(
        self, job_id: str, model: str, stages_s: Mapping[str, float], size_bytes: int
    ) -> None: ...
    def upload_unconfirmed(
        self, job_id: str, model: str, stages_s: Mapping[str, float], reason: str
    ) -> None: ...

    def upload_refused(self, job_id: str, model: str, stages_s: Mapping[str, float], reason: str) -> None: ...
    def upload_waits(self) -> None: ...


_TOKEN_REFUSED_DELAY_S = 300.0
"""A refused token is mended by a person; the picture waits."""
_OFFER_MAY_CROSS_S = 10.0
"""How long after a delivery an offer of that job may still be one that was sent before it."""


@dataclass(frozen=True)
class Patience:
    """Seconds between tries: doubled from ``base_s`` to ``cap_s``, shortened by jitter; ``disk_s`` between
    those to write and remove what a disk does not let be written and removed.
    """

    base_s: float = 1.0
    cap_s: float = 60.0
    token_refused_s: float = _TOKEN_REFUSED_DELAY_S
    disk_s: float = 10.0


class _Wait:
    """Until when one picture, or every one, waits. ``is_asked``: the studio named the time."""

    def __init__(self, patience: Patience) -> None:
        self._backoff = Backoff(random.Random(), base_s=patience.base_s, cap_s=patience.cap_s)
        self.until = 0.0
        self.is_asked = False

    def begin(self, now: float, asked_s: float | None) -> float:
        wait_s = max(self._backoff.next_s(), asked_s or 0.0)
        self.until, self.is_asked = now + wait_s, bool(asked_s)
        return wait_s


class Courier:
    """Delivers what is in the outbox, oldest first.

    Args:
        on_delivered: called with the job id when the studio has the picture, or expects it no more.
        on_unacceptable: called with job id and reason when the studio refuses the upload itself for good.
        on_lost: called with job id and reason when a picture is gone that the studio may still wait for.
        on_settled: called with the job id once the upload, during which the studio offered that very job,
            has ended: only now is it known what to answer.
    """

    def __init__(
        self,
        outbox: Outbox,
        api: StudioApi,
        *,
        on_delivered: Callable[[str], None],
        on_unacceptable: Callable[[str, str], None],
        on_lost: Callable[[str, str], None],
        on_settled: Callable[[str], None],
        reports: Reports,
        patience: Patience = Patience(),
    ) -> None:
        self._outbox = outbox
        self._api = api
        self._on_delivered = on_delivered
        self._on_unacceptable = on_unacceptable
        self._on_lost = on_lost
        self._on_settled = on_settled
        self._reports = reports
        self._patience = patience
        self._stopping = threading.Event()
        self._guard = threading.Lock()
        self._everything = _Wait(patience)
        self._each: dict[str, _Wait] = {}
        self._offered_again: set[str] = set()
        self._may_be_there: set[str] = set()
        self._delivered_at: dict[str, float] = {}
        self.uploading: str | None = None
        """The job whose upload is under way."""

    # --- called from other threads ---

    def stop(self) -> None:
        """Ask :meth:`run` to end after one last round."""
        self._stopping.set()
        self._outbox.wake()

    def hurry(self) -> None:
        """The studio is there again: what waits is tried now, unless the studio itself named a time."""
        with self._guard:
            for wait in (self._everything, *self._each.values()):
                if not wait.is_asked:
                    wait.until = 0.0
        self._outbox.wake()

    def offered_again(self, job_id: str) -> None:
        """The studio offers a job whose picture waits here: it is tried now, and kept over a refusal."""
        with self._guard:
            self._everything.until = 0.0
            self._each.pop(job_id, None)
            self._offered_again.add(job_id)
        self._outbox.wake()

    def is_uploading(self, job_id: str) -> bool:
        return self.uploading == job_id

    def has_just_delivered(self, job_id: str) -> bool:
        """Whether an offer of this job must have been sent before the studio had its picture."""
        delivered_at = self._delivered_at.get(job_id)
        return delivered_at is not None and time.monotonic() - delivered_at < _OFFER_MAY_CROSS_S

    # --- the courier's own thread ---

    def run(self, credentials: Credentials) -> None:
        """Deliver until told to stop; then one last round, so that what is finished is not left lying."""
        wait_s: float | None = 0.0
        while not self._stopping.is_set():
            self._outbox.wait(wait_s)
            wait_s = self._round(credentials)
        self.hurry()
        self._round(credentials)
        for job_id in self._outbox.only_in_memory():
            self._on_lost(job_id, "the disk took no picture, and the worker is stopping")

    def _round(self, credentials: Credentials) -> float | None:
        """Try what is due once; returns the seconds until the next try, ``None`` = nothing waits."""
        for delivery, reason in self._outbox.expire():
            self._on_lost(delivery.job_id, f"the picture was dropped undelivered: {reason}")
        self._outbox.catch_up()
        waiting = self._outbox.oldest()
        self._forget_others({delivery.job_id for delivery in waiting})
        for delivery in waiting:
            if self._due_in_s(delivery.job_id) <= 0.0:
                self._try(credentials, delivery)
        left = [self._due_in_s(d.job_id) for d in waiting if self._outbox.holds(d.job_id)]
        if not self._outbox.is_caught_up():
            left.append(self._patience.disk_s)
        return max(0.0, min(left)) if left else None

    def _due_in_s(self, job_id: str) -> float:
        with self._guard:
            wait = self._each.get(job_id)
            until = max(self._everything.until, wait.until if wait else 0.0)
        return until - time.monotonic()

    def _forget_others(self, waiting: set[str]) -> None:
        """What was offered again and is gone meanwhile, by a refusal that crossed the offer, is said so."""
        now = time.monotonic()
        with self._guard:
            gone = self._offered_again - waiting
            self._offered_again &= waiting
            self._each = {job_id: wait for job_id, wait in self._each.items() if job_id in waiting}
            self._may_be_there &= waiting
            self._delivered_at = {
                job_id: at for job_id, at in self._delivered_at.items() if now - at < _OFFER_MAY_CROSS_S
            }
        for job_id in gone - self._delivered_at.keys():
            self._on_lost(job_id, "the studio refused its picture before")

    def _try(self, credentials: Credentials, delivery: Delivery) -> None:
        job_id = delivery.job_id
        with self._guard:
            self._offered_again.discard(job_id)
            self.uploading = job_id
        try:
            self._upload(credentials, delivery)
        finally:
            with self._guard:
                self.uploading = None
                is_offered = job_id in self._offered_again
                self._offered_again.discard(job_id)  # settled below, and marked anew if it is
            if is_offered:
                self._on_settled(job_id)

    def _upload(self, credentials: Credentials, delivery: Delivery) -> None:
        started = time.monotonic()
        try:
            self._api.upload(credentials.worker_id, credentials.auth_token, delivery)
        except DeliveryRefused as refusal:
            with self._guard:
                is_offered = delivery.job_id in self._offered_again
            if is_offered and refusal.job_is_gone:
                log.info("refused result is wanted again", extra=_facts(delivery, status=refusal.status))
            elif refusal.status == 409 and (refusal.is_answer_lost or delivery.job_id in self._may_be_there):
                self._end_unconfirmed(delivery)
            else:
                self._drop(delivery, refusal)
        except RefusedByStudio as error:
            log.error("delivery waits for a new registration", extra=_facts(delivery, error=str(error)))
            self._wait(self._everything, self._patience.token_refused_s)
        except StudioUnavailable as error:
            if error.is_answer_lost:
                self._may_be_there.add(delivery.job_id)
            is_for_all = error.status in {None, 429, 503}
            wait_s = self._wait(
                self._everything if is_for_all else self._wait_of(delivery), error.retry_after_s
            )
            self._reports.upload_waits()
            log.warning(
                "delivery has to wait",
                extra=_facts(delivery, error=str(error), retry_in_s=round(wait_s, 1)),
            )
        except Exception as error:
            # One picture that cannot be read or sent must not keep the others from the studio. Logged by its
            # frames, without its text, which may quote the prompt.
            wait_s = self._wait(self._wait_of(delivery), None)
            log.error(
                "delivery failed",
                extra=_facts(
                    delivery,
                    error=getattr(error, "strerror", None) or type(error).__name__,
                    retry_in_s=round(wait_s, 1),
                    traceback="".join(traceback.format_tb(error.__traceback__)),
                ),
            )
        else:
            with self._guard:
                self._delivered_at[delivery.job_id] = time.monotonic()
                self._everything = _Wait(self._patience)
            size_bytes = delivery.size_bytes()
            self._outbox.remove(delivery)
            self._on_delivered(delivery.job_id)
            stages_s = {**delivery.timings_s, "upload": time.monotonic() - started}
            self._reports.upload_delivered(delivery.job_id, delivery.model, stages_s, size_bytes)
            _log_summary(delivery, stages_s)

    def _wait_of(self, delivery: Delivery) -> _Wait:
        with self._guard:
            return self._each.setdefault(delivery.job_id, _Wait(self._patience))

    def _wait(self, wait: _Wait, asked_s: float | None) -> float:
        with self._guard:
            return wait.begin(time.monotonic(), asked_s)

    def _end_unconfirmed(self, delivery: Delivery) -> None:
        """The studio wants no more of a picture that it may have had from a try whose answer was lost."""
        reason = "the studio probably has it: HTTP 409 after a try whose answer was lost on the way"
        log.warning("result was probably delivered", extra=_facts(delivery, status=409, reason=reason))
        self._outbox.remove(delivery)
        self._reports.upload_unconfirmed(delivery.job_id, delivery.model, delivery.timings_s, reason)
        self._on_delivered(delivery.job_id)

    def _drop(self, delivery: Delivery, refusal: DeliveryRefused) -> None:
        log.error("result refused for good and dropped", extra=_facts(delivery, status=refusal.status))
        self._outbox.remove(delivery)
        self._reports.upload_refused(delivery.job_id, delivery.model, delivery.timings_s, str(refusal))
        if refusal.job_is_gone:
            self._on_delivered(delivery.job_id)
        else:
            self._on_unacceptable(delivery.job_id, str(refusal))


def _facts(delivery: Delivery, **more: object) -> dict[str, object]:
    return {"op": "delivery", "job_id": delivery.job_id, "model": delivery.model, **more}


def _log_summary(delivery: Delivery, stages_s: Mapping[str, float]) -> None:
    """The one line of a finished job: the picture's size, the one asked for where it was rounded, and every
    stage in milliseconds.
    """
    meta = delivery.meta
    sizes = {"size": ("width", "height"), "asked_size": ("askedWidth", "askedHeight")}
    log.info(
        "job done",
        extra={
            "op": "job",
            "job_id": delivery.job_id,
            "model": delivery.model,
            "outcome": "done",
            **{
                name: f"{meta[width]}x{meta[height]}"
                for name, (width, height) in sizes.items()
                if width in meta and height in meta
            },
            **{f"{stage}_ms": round(seconds * 1000) for stage, seconds in stages_s.items()},
        },
    )
