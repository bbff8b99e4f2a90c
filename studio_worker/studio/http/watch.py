"""Orders queued and waited for, each told once: its id, how it ended, and where its picture lies.

A studio that goes away is waited for, while orders are queued as well as afterwards. Each has an id of its
own before it is sent: whatever answer is lost, the order is sent again, and is one job.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from studio_worker.errors import OrderRefused, StudioUnavailable, StudioWorkerError
from studio_worker.files import write_atomic
from studio_worker.studio.http.orders import Order, Orders

LOOK_EVERY_S = 1.0
AWAY_S = 120.0
"""A studio that does not answer for so long is not just being restarted."""


class Watch:
    """The orders of one command. ``exit_status`` is what came of them so far.

    Args:
        folder: where pictures are put; ``None`` leaves them in the studio.
        timeout_s: no order is waited for longer, nor a studio that is away; 0 is for ever.
        tell: is given each line.
        complain: is given what is wrong meanwhile.
    """

    def __init__(
        self,
        orders: Orders,
        folder: Path | None,
        *,
        timeout_s: float = 0,
        tell: Callable[[str], None],
        complain: Callable[[str], None],
    ) -> None:
        self.exit_status = 0
        self._orders = orders
        self._folder = folder
        self._timeout_s = timeout_s
        self._tell = tell
        self._complain = complain
        self._trouble = ""
        self._began_at = self._heard_at = time.monotonic()
        self._left: dict[str, Order] = {}
        self._is_id_kept = True

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Whatever ends the command within: no job that is still in the studio stays unnamed. SIGTERM ends it
        as SIGINT does; only from the main thread.
        """
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            for order in self._left.values():
                self._tell(" ".join(filter(None, (order.job_id, order.status, order.reason))))

    def queue(self, job: Mapping[str, Any]) -> Order:
        """Queue one more, again and again where the studio is away or its answer is lost.

        Raises:
            StudioUnavailable: it is away for longer than a restart takes, or the time is up; at once where
                nothing is queued yet, or where it gives a job another id than it was sent with: what is
                repeated would be two jobs.
            OrderRefused, RefusedByStudio, ConfigError: as ``Orders.queue``.
        """
        job_id = str(uuid.uuid4())
        while True:
            try:
                order = self._sent(job_id, job)
            except StudioUnavailable as error:
                if not (self._left and self._is_id_kept):
                    raise
                self._bear(error)
                if self._is_time_up():
                    raise StudioUnavailable(self._trouble) from None
                time.sleep(LOOK_EVERY_S)
            else:
                self._is_id_kept = order.job_id == job_id
                self._heard()
                return order

    def _sent(self, job_id: str, job: Mapping[str, Any]) -> Order:
        """One attempt. Whatever ends it, an order that may be in the studio is among those left."""
        may_be_there = job_id in self._left
        self._left[job_id] = Order(job_id, "unknown", reason="it may be in the studio")
        try:
            order = self._orders.queue({**job, "jobId": job_id})
        except StudioWorkerError as error:
            if not (may_be_there or (isinstance(error, StudioUnavailable) and error.is_answer_lost)):
                del self._left[job_id]
            raise
        del self._left[job_id]
        self._left[order.job_id] = order
        return order

    def wait(self) -> None:
        """Until all are over, or the time is.

        Raises:
            StudioUnavailable: the studio is away for longer than a restart takes.
            RefusedByStudio: its token was changed.
            OSError: a picture cannot be written.
        """
        while True:
            try:
                for job_id in list(self._left):
                    self._look(job_id)
                    self._heard()
            except StudioUnavailable as error:
                self._bear(error)
            if not self._left:
                return
            if self._is_time_up():
                self.exit_status = os.EX_TEMPFAIL
                if self._trouble:
                    self._complain(self._trouble)
                return
            time.sleep(LOOK_EVERY_S)

    def _heard(self) -> None:
        self._heard_at, self._trouble = time.monotonic(), ""

    def _bear(self, error: StudioUnavailable) -> None:
        self._note(error)
        if time.monotonic() - self._heard_at > AWAY_S:
            raise StudioUnavailable(self._trouble) from None

    def _is_time_up(self) -> bool:
        return 0 < self._timeout_s <= time.monotonic() - self._began_at

    def _note(self, error: StudioUnavailable) -> None:
        """Told when it begins; what is said of it at the end is when that was."""
        if self._trouble:
            return
        since = time.strftime("%H:%M:%S")
        if error.reason:
            self._trouble = (
                f"the studio at {self._orders.address} cannot be reached since {since}: {error.reason}"
            )
        else:
            self._trouble = f"since {since}: {error}"
        self._complain(self._trouble)

    def _look(self, job_id: str) -> None:
        try:
            order = self._left[job_id] = self._orders.see(job_id)
        except OrderRefused as error:  # somebody has removed it
            order = Order(job_id, "failed", reason=str(error))
        if not order.is_over:
            return
        words = [job_id, order.status]
        if order.status == "failed":
            self.exit_status = 1
            words.append(order.reason)
        elif self._folder is not None:
            path = self._folder / f"{job_id}.{order.ext}"
            content = self._orders.picture(job_id)
            try:
                write_atomic(path, content, mode=0o644)
            except OSError as error:
                said = f"{error.strerror}; the picture is still in the studio"
                raise OSError(error.errno, said, str(path)) from error
            words.append(str(path))
        del self._left[job_id]
        self._tell(" ".join(words))


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
