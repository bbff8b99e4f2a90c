"""What the running service says of itself: status, over the control socket, and metrics.

Joins the record of what is done with the facts that live elsewhere: the process, the outbox, the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio_worker import __version__
from studio_worker.appliance.gpu_watch import GpuWatch
from studio_worker.appliance.parts import Parts
from studio_worker.config.settings import Settings
from studio_worker.config.values import listen_address
from studio_worker.report.activity import Activity
from studio_worker.report.metrics import Exporter, Metrics
from studio_worker.report.snapshot import (
    DeviceFacts,
    OutboxFacts,
    ResidentModel,
    Snapshot,
    TurnFacts,
)
from studio_worker.report.starts import Starts
from studio_worker.work.health import Health


class EarlyStatus:
    """What is known of this process before the device is: what it waits for."""

    def __init__(self, activity: Activity, starts: Starts) -> None:
        self._activity = activity
        self._starts = starts

    def answer(self) -> dict[str, Any]:
        """For the control socket."""
        return self.snapshot().model_dump(mode="json")

    def snapshot(self) -> Snapshot:
        """Everything at this moment."""
        snapshot = self._activity.snapshot()
        facts = {
            "pid": os.getpid(),
            "memory_bytes": _resident_set_bytes(),
            "starts": self._starts.count,
            "crashes": self._starts.crashes,
            "last_crash_at": self._starts.last_crash_at,
        }
        process = snapshot.process.model_copy(update=facts)
        return snapshot.model_copy(update={"version": __version__, "process": process})


class Status:
    """What is known of the whole service. Safe from any thread.

    Args:
        studio: its address, as it may be shown.
    """

    def __init__(
        self,
        early: EarlyStatus,
        parts: Parts,
        health: Health,
        gpu: GpuWatch,
        turns: Callable[[], TurnFacts],
        studio: str,
    ) -> None:
        self._early = early
        self._parts = parts
        self._health = health
        self._gpu = gpu
        self._turns = turns
        self._studio = studio

    def answer(self) -> dict[str, Any]:
        """For the control socket."""
        return self.snapshot().model_dump(mode="json")

    def snapshot(self) -> Snapshot:
        """Everything at this moment."""
        device, engines = self._parts.device, self._parts.engines
        waiting = self._parts.outbox.usage()
        return self._early.snapshot().model_copy(
            update={
                "studio": self._studio,
                "health": self._health.facts(),
                "turns": self._turns(),
                "outbox": OutboxFacts(
                    count=waiting.count,
                    size_bytes=waiting.size_bytes,
                    oldest_at=waiting.oldest_at,
                    uploading=next(filter(None, (each.under_way for each in self._parts.uploads)), None),
                ),
                "device": DeviceFacts(
                    name=device.name,
                    description=device.description,
                    total_bytes=round(device.memory_gb * 1e9),
                    used_bytes=engines.used_bytes(),
                    gpu=self._gpu.facts,
                ),
                "resident": tuple(
                    ResidentModel(
                        model=model,
                        size_bytes=found.size_bytes,
                        place=found.place,
                        unpacked=found.is_unpacked,
                    )
                    for model, found in engines.resident().items()
                ),
            }
        )


def open_exporter(
    settings: Settings, status: Status, activity: Activity, reload_succeeded: Callable[[], bool]
) -> Exporter:
    """The metrics, where the configuration wants them; to be closed.

    Raises:
        ConfigError: as :class:`Exporter`.
    """
    metrics = Metrics(status.snapshot, reload_succeeded)
    activity.on_job_end(metrics.job_ended)
    wanted = settings.metrics
    listen = None if wanted.listen is None else listen_address(wanted.listen)
    return Exporter(metrics, listen, wanted.textfile)


def _resident_set_bytes() -> int:
    """Memory of this process (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
