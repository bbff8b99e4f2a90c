"""Orders that are waited for, each told once: its id, how it ended, and where its picture lies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from studio_worker.errors import OrderRefused, StudioUnavailable
from studio_worker.files import write_atomic
from studio_worker.studio.http.orders import Order, Orders

LOOK_EVERY_S = 1.0
AWAY_S = 120.0
"""A studio that does not answer for so long is not just being restarted."""


class Watch:
    """The orders of one command. ``exit_status`` is what came of them so far.

    Args:
        folder: where pictures are put; ``None`` leaves them in the studio.
        tell: is given each line.
        complain: is given what is wrong meanwhile.
    """

    def __init__(
        self,
        orders: Orders,
        folder: Path | None,
        *,
        tell: Callable[[str], None],
        complain: Callable[[str], None],
    ) -> None:
        self.exit_status = 0
        self._orders = orders
        self._folder = folder
        self._tell = tell
        self._complain = complain
        self._trouble = ""
        self._left: dict[str, Order] = {}

    def add(self, order: Order) -> None:
        """An order that was queued."""
        self._left[order.job_id] = order

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

    def wait(self, timeout_s: float) -> None:
        """Until all are over, or the time is; 0 is for ever.

        Raises:
            StudioUnavailable: the studio is away for longer than a restart takes.
            RefusedByStudio: its token was changed.
            OSError: a picture cannot be written.
        """
        began_at = heard_at = time.monotonic()
        while True:
            try:
                for job_id in list(self._left):
                    self._look(job_id)
                    heard_at, self._trouble = time.monotonic(), ""
            except StudioUnavailable as error:
                self._note(error)
                if time.monotonic() - heard_at > AWAY_S:
                    raise StudioUnavailable(self._trouble) from None
            if not self._left:
                return
            if timeout_s and time.monotonic() - began_at >= timeout_s:
                self.exit_status = os.EX_TEMPFAIL
                if self._trouble:
                    self._complain(self._trouble)
                return
            time.sleep(LOOK_EVERY_S)

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
