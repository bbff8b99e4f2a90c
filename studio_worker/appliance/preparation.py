"""From the process's start to READY: the device's nodes, the device itself, the required models.

The main thread waits for a helper thread, so that a stop is never stuck behind a stalled mirror or a driver.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from studio_worker.appliance.provisioning import ProvisionProgress, provision
from studio_worker.box.device import Device, probe, wait_for_device
from studio_worker.context import called
from studio_worker.errors import DeviceError
from studio_worker.models import RequiredModel
from studio_worker.report.notify import Notifier
from studio_worker.spool.in_hand import JobInHand
from studio_worker.store import Store
from studio_worker.work.health import Health

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5


def await_nodes(setting: str, notifier: Notifier, stop_comes_within: Callable[[float], bool]) -> bool:
    """Wait for the device's nodes, for a bounded time; ``False`` where the service was told to stop.

    Args:
        stop_comes_within: waits so many seconds, and says whether that came.
    """

    def tell(missing: list[str]) -> None:
        notifier.status(f"waiting for {', '.join(missing)}")
        notifier.extend_timeout()  # the wait is bounded; what comes after it has its own progress

    return wait_for_device(setting, on_wait=tell, wait=stop_comes_within)


def recover(in_hand: JobInHand, health: Health) -> None:
    """Note what the last process left: a job in the middle of which it ended counts against this box."""
    found = in_hand.recover()
    for job_id in found:
        with called(job_id=job_id):
            log.warning(
                "the last process ended with this job in hand",
                extra={"op": "job", "refused_from_now": in_hand.is_poisoned(job_id)},
            )
    if found:
        health.crashed(in_hand.crashes_in_a_row)


def try_again(device: Device, rest: Callable[[], Sequence[threading.Event]], stop: threading.Event) -> str:
    """What is wrong with ``device`` after jobs failed on it; empty = it computes.

    Args:
        rest: lets our own models leave it, which the trial would lack the room of; sets the events then, one
            of each lane.
        stop: ends it.
    """
    if not device.is_gpu:
        return ""
    for rested in rest():
        while not rested.wait(_LOOK_AGAIN_S):
            if stop.is_set():
                return ""
    return str(probe(device.name, stop=stop)["error"])


class Preparation:
    """What must have succeeded before READY.

    Args:
        stop: ends it.
        on_usable: called once the device has been tried out.
    """

    def __init__(
        self,
        store: Store,
        device: Device,
        notifier: Notifier,
        stop: threading.Event,
        on_usable: Callable[[], None],
    ) -> None:
        self._store = store
        self._device = device
        self._notifier = notifier
        self._stop = stop
        self._on_usable = on_usable
        self._ends: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run(self, required: tuple[RequiredModel, ...], *, compiles: bool) -> bool:
        """Whether the device computes and ``required`` is verified; ``False`` = stopped before.

        Args:
            compiles: whether torch must be able to compile for the device, too.

        Raises:
            DeviceError: torch cannot compute on the device, so that READY is never said of one.
            DownloadError: a required file could not be fetched, verified or stored.
        """
        self._store.clean_staging()
        progress = ProvisionProgress(self._notifier.status, self._notifier.extend_timeout)

        def work() -> None:
            try:
                self._try_device(compiles=compiles)
                self._on_usable()
                provision(self._store, required, progress, self._stop)
                self._ends.put(None)
            except Exception as error:  # whatever it is, the main thread waits for it
                self._ends.put(error)

        threading.Thread(target=work, name="provision", daemon=True).start()
        error = self._ends.get()
        if self._stop.is_set():
            return False
        if error is not None:
            raise error
        return True

    def give_up(self, error: Exception | None = None) -> None:
        """Let :meth:`run` return at once, ``stop`` being set, or raise ``error``. Safe from any thread, also
        where it is over.
        """
        self._ends.put(error)

    def _try_device(self, *, compiles: bool) -> None:
        if not self._device.is_gpu and not compiles:
            return
        self._notifier.status(f"trying out {self._device.name}")
        self._notifier.extend_timeout()
        facts: dict[str, Any] = probe(self._device.name, compiles=compiles, stop=self._stop)
        if not facts["ok"]:
            raise DeviceError(facts["error"])
        log.info("device tried out", extra={"op": "device", **facts})
