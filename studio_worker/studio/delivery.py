"""Emptying the outbox: one thread that uploads finished pictures until the studio has or refuses them.

Uploads do not hold up the next job and go on after a restart. One summary line a finished job is logged
here, when its last stage, the upload, is known.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from studio_worker.errors import DeliveryRefused, RefusedByStudio, StudioUnavailable
from studio_worker.spool import Delivery, Outbox
from studio_worker.studio.api import StudioApi
from studio_worker.studio.registration import Credentials


class Reports(Protocol):
    """Who is told what becomes of deliveries. Stages are seconds."""

    def upload_delivered(
        self, job_id: str, model: str, stages_s: Mapping[str, float], size_bytes: int
    ) -> None: ...
    def upload_refused(self, job_id: str, model: str, stages_s: Mapping[str, float], reason: str) -> None: ...
    def upload_waits(self) -> None: ...


log = logging.getLogger(__name__)

_DELAYS_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_TOKEN_REFUSED_DELAY_S = 300.0
"""A refused token is mended by a person; the picture waits."""


class Courier:
    """Delivers what is in the outbox, oldest first.

    Args:
        on_delivered: called with the job id when the studio has the picture, or expects it no more.
        on_unacceptable: called with job id and reason when the studio refuses the upload itself for good.
        delays_s: seconds between tries.
    """

    def __init__(
        self,
        outbox: Outbox,
        api: StudioApi,
        *,
        on_delivered: Callable[[str], None],
        on_unacceptable: Callable[[str, str], None],
        reports: Reports,
        delays_s: tuple[float, ...] = _DELAYS_S,
    ) -> None:
        self._outbox = outbox
        self._api = api
        self._on_delivered = on_delivered
        self._on_unacceptable = on_unacceptable
        self._reports = reports
        self._delays_s = delays_s
        self._stopping = threading.Event()
        self._failures = 0
        self.uploading: str | None = None
        """The job whose upload is under way."""

    def run(self, credentials: Credentials) -> None:
        """Deliver until told to stop; then one last round, so that what is finished is not left lying."""
        wait_s: float | None = 0.0
        while not self._stopping.is_set():
            self._outbox.wait(wait_s)
            wait_s = self._round(credentials)
        self._round(credentials)

    def stop(self) -> None:
        """Ask :meth:`run` to end after one last round."""
        self._stopping.set()
        self._outbox.wake()

    def _round(self, credentials: Credentials) -> float | None:
        """Try everything once; returns the seconds until the next try, ``None`` = nothing waits."""
        for delivery in self._outbox.oldest():
            started = time.monotonic()
            try:
                self.uploading = delivery.job_id
                self._api.upload(credentials.worker_id, credentials.auth_token, delivery)
            except DeliveryRefused as refusal:
                self._drop(delivery, refusal)
            except RefusedByStudio as error:
                log.error("delivery waits for a new registration", extra=_facts(delivery, error=str(error)))
                return _TOKEN_REFUSED_DELAY_S
            except StudioUnavailable as error:
                delay = self._delays_s[min(self._failures, len(self._delays_s) - 1)]
                self._failures += 1
                self._reports.upload_waits()
                wait_s = max(delay, error.retry_after_s or 0.0)
                log.warning(
                    "delivery has to wait", extra=_facts(delivery, error=str(error), retry_in_s=wait_s)
                )
                return wait_s
            else:
                self._failures = 0
                size_bytes = delivery.data_path.stat().st_size
                self._outbox.remove(delivery)
                self._on_delivered(delivery.job_id)
                stages_s = {**delivery.timings_s, "upload": time.monotonic() - started}
                self._reports.upload_delivered(delivery.job_id, delivery.model, stages_s, size_bytes)
                _log_summary(delivery, stages_s)
            finally:
                self.uploading = None
        return None

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
    """The one line of a finished job: every stage in milliseconds."""
    log.info(
        "job done",
        extra={
            "op": "job",
            "job_id": delivery.job_id,
            "model": delivery.model,
            "outcome": "done",
            **{f"{stage}_ms": round(seconds * 1000) for stage, seconds in stages_s.items()},
        },
    )
