"""From required models to verified files, with progress that systemd and the log can follow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from studio_worker.models import RequiredModel
from studio_worker.store import Store

log = logging.getLogger(__name__)

_STATUS_EVERY_S = 1.0
_LOG_EVERY_S = 10.0


class ProvisionProgress:
    """Turns the store's byte counts into a status line, log lines and signs of life.

    Args:
        on_status: gets a line such as ``sample: 42% of 6.5 MB``, at most once a second.
        on_advance: called with it, and only when bytes have advanced, so that a stalled mirror lets the
            start time out instead of hanging it.
    """

    def __init__(
        self,
        on_status: Callable[[str], None],
        on_advance: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_status = on_status
        self._on_advance = on_advance
        self._clock = clock
        self._said_at = self._logged_at = float("-inf")
        self._last = 0
        self.label = ""

    def __call__(self, done: int, total: int | None) -> None:
        now = self._clock()
        if done == self._last or now - self._said_at < _STATUS_EVERY_S:
            return
        self._last, self._said_at = done, now
        self._on_advance()
        line = f"{self.label}: {_share(done, total)}"
        self._on_status(line)
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            log.info(
                "provisioning",
                extra={"op": "provision", "model": self.label, "bytes": done, "bytes_total": total},
            )


def provision(
    store: Store, required: Sequence[RequiredModel], progress: ProvisionProgress, cancel: threading.Event
) -> None:
    """Every file of every required model on disk and verified when this returns.

    Raises:
        DownloadError: a file could not be fetched, verified or stored.
    """
    began = time.monotonic()
    for model in required:
        progress.label = model.id
        store.ensure(model.files, progress=progress, cancel=cancel)
        log.info("model verified", extra={"op": "provision", "model": model.id, "files": len(model.files)})
    log.info(
        "required models verified",
        extra={
            "op": "provision",
            "models": len(required),
            "elapsed_ms": round((time.monotonic() - began) * 1000),
        },
    )


def _share(done: int, total: int | None) -> str:
    if not total:
        return f"{done / 1e6:.1f} MB"
    return f"{100 * done // total}% of {total / 1e6:.1f} MB"
