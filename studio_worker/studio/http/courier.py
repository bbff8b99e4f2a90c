"""Emptying a lane's part of the outbox: one thread uploads its pictures until the studio has or refuses them.

Uploads do not hold up the next job, nor each other: a picture that the studio stumbles over waits by itself,
and only where the studio cannot be reached at all, or asks for patience, do all wait. One summary line a
finished job is logged here, when its last stage, the upload, is known.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Protocol

from studio_worker.context import called
from studio_worker.errors import DeliveryRefused, RefusedByStudio, StudioUnavailable
from studio_worker.network.reasons import said
from studio_worker.spool.delivery import Delivery
from studio_worker.spool.part import OutboxPart
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import Credentials
from studio_worker.studio.http.uploads import Uploads
from studio_worker.wording import frames

log = logging.getLogger(__name__)

_NO_WAIT_S = 0.001
"""What is less was no wait for another upload."""


class DeliveryReports(Protocol):
    """Who is told what becomes of deliveries. Stages are seconds."""

    def upload_delivered(
        self, job_id: str, model: str, stages_s: Mapping[str, float], size_bytes: int
    ) -> None: ...
    def upload_unconfirmed(
        self, job_id: str, model: str, stages_s: Mapping[str, float], reason: str
    ) -> None: ...

    def upload_refused(self, job_id: str, model: str, stages_s: Mapping[str, float], reason: str) -> None: ...
    def upload_waits(self) -> None: ...


class ClaimHolder(Protocol):
    """Who holds the studio's claims on jobs, and tells it what became of a picture that it waits for."""

    def delivered(self, job_id: str) -> None:
        """The studio has the picture, or expects it no more."""
        ...

    def report_failure(self, job_id: str, error: str, *, retryable: bool) -> None:
        """The studio refused the upload itself for good."""
        ...

    def lost(self, job_id: str, error: str) -> None:
        """A picture is gone that the studio may still wait for."""
        ...

    def settled(self, job_id: str) -> None:
        """The upload has ended, during which the studio offered that very job: only now is it known what to
        answer.
        """
        ...


class Courier:
    """Delivers what is in its part of the outbox, oldest first."""

    def __init__(
        self,
        api: StudioApi,
        outbox: OutboxPart,
        uploads: Uploads,
        claims: ClaimHolder,
        reports: DeliveryReports,
    ) -> None:
        self._api = api
        self._outbox = outbox
        self._uploads = uploads
        self._claims = claims
        self._reports = reports
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask :meth:`run` to end after one last round. From any thread."""
        self._stopping.set()
        self._outbox.wake()

    # --- the courier's own thread ---

    def run(self, credentials: Credentials) -> None:
        """Deliver until told to stop; then one last round, so that what is finished is not left lying."""
        wait_s: float | None = 0.0
        while not self._stopping.is_set():
            self._outbox.wait(wait_s)
            wait_s = self._round(credentials)
        self._uploads.hurry()
        self._round(credentials)
        for job_id in self._outbox.only_in_memory():
            self._claims.lost(job_id, "the disk took no picture, and the worker is stopping")

    def _round(self, credentials: Credentials) -> float | None:
        """Try what is due once; returns the seconds until the next try, ``None`` = nothing waits."""
        for delivery, reason in self._outbox.expire():
            self._claims.lost(delivery.job_id, f"the picture was dropped undelivered: {reason}")
        self._outbox.catch_up()
        waiting = self._outbox.oldest()
        for job_id in self._uploads.forget_others({delivery.job_id for delivery in waiting}):
            self._claims.lost(job_id, "the studio refused its picture before")
        for delivery in waiting:
            if self._uploads.due_in_s(delivery.job_id) <= 0.0:
                with called(job_id=delivery.job_id, model=delivery.model):
                    self._try(credentials, delivery)
        left = [self._uploads.due_in_s(d.job_id) for d in waiting if self._outbox.holds(d.job_id)]
        if not self._outbox.is_caught_up():
            left.append(self._uploads.patience.disk_s)
        return max(0.0, min(left)) if left else None

    def _try(self, credentials: Credentials, delivery: Delivery) -> None:
        self._uploads.begin(delivery.job_id)
        try:
            self._upload(credentials, delivery)
        finally:
            if self._uploads.end(delivery.job_id):
                self._claims.settled(delivery.job_id)

    def _upload(self, credentials: Credentials, delivery: Delivery) -> None:
        began = time.monotonic()
        try:
            waited_s = self._api.upload(credentials.worker_id, credentials.auth_token, delivery)
        except DeliveryRefused as refusal:
            self._refused(delivery, refusal)
        except RefusedByStudio as error:
            facts = {"op": "delivery", "error": str(error)}
            log.error("delivery waits for a new registration", extra=facts)
            self._uploads.put_off(None, self._uploads.patience.token_refused_s)
        except StudioUnavailable as error:
            self._put_off(delivery, error)
        except Exception as error:
            # One picture that cannot be read or sent must not keep the others from the studio. Logged by its
            # frames, without its text, which may quote the prompt.
            wait_s = self._uploads.put_off(delivery.job_id)
            log.error(
                "delivery failed",
                extra={
                    "op": "delivery",
                    "error": said(error),
                    "retry_in_s": round(wait_s, 1),
                    "traceback": frames(error),
                },
            )
        else:
            took_s = time.monotonic() - began - waited_s
            stages_s = {"uplink": waited_s, "upload": took_s} if waited_s > _NO_WAIT_S else {"upload": took_s}
            self._delivered(delivery, {**delivery.timings_s, **stages_s})

    def _delivered(self, delivery: Delivery, stages_s: Mapping[str, float]) -> None:
        self._uploads.delivered(delivery.job_id)
        size_bytes = delivery.size_bytes()
        self._outbox.remove(delivery)
        self._claims.delivered(delivery.job_id)
        self._reports.upload_delivered(delivery.job_id, delivery.model, stages_s, size_bytes)
        _log_summary(delivery, stages_s)

    def _put_off(self, delivery: Delivery, error: StudioUnavailable) -> None:
        if error.is_answer_lost:
            self._uploads.answer_lost(delivery.job_id)
        is_for_all = error.status in {None, 429, 503}
        wait_s = self._uploads.put_off(None if is_for_all else delivery.job_id, error.retry_after_s)
        self._reports.upload_waits()
        log.warning(
            "delivery has to wait",
            extra={"op": "delivery", "error": str(error), "retry_in_s": round(wait_s, 1)},
        )

    def _refused(self, delivery: Delivery, refusal: DeliveryRefused) -> None:
        if self._uploads.is_offered_again(delivery.job_id) and refusal.job_is_gone:
            facts = {"op": "delivery", "status": refusal.status}
            log.info("refused result is wanted again", extra=facts)
        elif refusal.status == 409 and (
            refusal.is_answer_lost or self._uploads.may_be_there(delivery.job_id)
        ):
            self._end_unconfirmed(delivery)
        else:
            self._drop(delivery, refusal)

    def _end_unconfirmed(self, delivery: Delivery) -> None:
        """The studio wants no more of a picture that it may have had from a try whose answer was lost."""
        reason = "the studio probably has it: HTTP 409 after a try whose answer was lost on the way"
        facts = {"op": "delivery", "status": 409, "reason": reason}
        log.warning("result was probably delivered", extra=facts)
        self._outbox.remove(delivery)
        self._reports.upload_unconfirmed(delivery.job_id, delivery.model, delivery.timings_s, reason)
        self._claims.delivered(delivery.job_id)

    def _drop(self, delivery: Delivery, refusal: DeliveryRefused) -> None:
        facts = {"op": "delivery", "status": refusal.status}
        log.error("result refused for good and dropped", extra=facts)
        self._outbox.remove(delivery)
        self._reports.upload_refused(delivery.job_id, delivery.model, delivery.timings_s, str(refusal))
        if refusal.job_is_gone:
            self._claims.delivered(delivery.job_id)
        else:
            self._claims.report_failure(delivery.job_id, str(refusal), retryable=False)


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
            "outcome": "done",
            **{
                name: f"{meta[width]}x{meta[height]}"
                for name, (width, height) in sizes.items()
                if width in meta and height in meta
            },
            **{f"{stage}_ms": round(seconds * 1000) for stage, seconds in stages_s.items()},
        },
    )
