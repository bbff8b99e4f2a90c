"""What this box can do: as the studio is told by each lane, and as each offer to it is judged by."""

from __future__ import annotations

import dataclasses
import getpass
import logging
import socket
import time
from collections.abc import Sequence

from studio_worker import __version__
from studio_worker.appliance.parts import LaneParts, Parts
from studio_worker.box.ram import available_ram_bytes
from studio_worker.config.current import Current
from studio_worker.engine.rendering.estimate import JUDGED, Estimates
from studio_worker.errors import DownloadError
from studio_worker.jobs import ImageTask
from studio_worker.models import LocalFile, ModelFile, ModelSource
from studio_worker.network.urls import is_data_url
from studio_worker.studio.session.offers import Need, Situation
from studio_worker.studio.wire import Capabilities
from studio_worker.work.breaker import Refusal
from studio_worker.work.health import Health

log = logging.getLogger(__name__)


class Abilities:
    """Asked anew each time, since all of it changes. Safe from any thread.

    Args:
        health: what the last jobs say of this box.
    """

    def __init__(self, parts: Parts, lane: LaneParts, current: Current, health: Health) -> None:
        self._parts = parts
        self._lane = lane
        self._estimates = Estimates(parts.device, parts.engines.peaks)
        self._current = current
        self._health = health

    def capabilities(self) -> Capabilities:
        """What registration and heartbeats say of this box."""
        models = tuple(f"{engine}:*" for engine in sorted(self._parts.engines.names()))
        return Capabilities(
            machine_name=socket.gethostname() + self._lane_name(),
            username=_username(),
            agent_version=__version__,
            vram_total_gb=self._device_gib() if self._parts.device.is_gpu else 0,
            vram_threshold_gb=self._threshold_gib(),
            auto_enabled=not self._lane.desk.is_paused,
            supported_models=models,
            supported_models_per_kind={"image": models},
        )

    def situation(self) -> Situation:
        """What an offer is judged by at this moment."""
        models = self._current.settings.models
        return Situation(
            now=time.monotonic(),
            current_job_id=self._lane.desk.current_job_id,
            is_elsewhere=self._is_elsewhere,
            is_paused=self._lane.desk.is_paused,
            threshold_gib=self._threshold_gib(),
            engines=self._parts.engines.names(),
            on_demand=models.on_demand,
            allow_insecure_urls=models.allow_insecure_urls,
            is_uploading=self._lane.uploads.is_under_way,
            is_just_delivered=self._is_just_delivered,
            is_in_outbox=self._parts.outbox.holds,
            state_problem=lambda: self._parts.outbox.fullness() or self._parts.in_hand.problem(),
            is_poisoned=self._parts.in_hand.is_poisoned,
            failed_for_good=self._parts.failures.final,
            is_on_box=self._is_on_box,
            shortfall_bytes=self._parts.store.shortfall_bytes,
            memory_gb=self._memory_gb(),
            needed_gb=self._needed_gb,
            held_back=self._held_back,
            previewed=self._previewed,
            is_paused_by_now=lambda: self._lane.desk.is_paused,
        )

    def reconnect_attempts(self) -> int:
        """Failed connections in a row before the service gives up; 0 = never."""
        return self._current.settings.studio.reconnect_attempts

    def _lane_name(self) -> str:
        return "" if self._lane.number == 1 else f" (lane {self._lane.number})"

    def _is_elsewhere(self, job_id: str) -> bool:
        """Whether another lane works on it, or delivers it at this moment."""
        others = (uploads for uploads in self._parts.uploads if uploads is not self._lane.uploads)
        return self._lane.desk.is_elsewhere(job_id) or any(each.is_under_way(job_id) for each in others)

    def _is_just_delivered(self, job_id: str) -> bool:
        return any(uploads.has_just_delivered(job_id) for uploads in self._parts.uploads)

    def _threshold_gib(self) -> float:
        return self._current.settings.worker.vram_threshold_gb or self._device_gib()

    def _device_gib(self) -> float:
        """As the studio is told: what it then offers is not refused for a difference in rounding."""
        return round(self._parts.device.memory_gb * 1e9 / 2**30, 2)

    def _memory_gb(self) -> float:
        """What the device has for a job when our own models have left it, as far as it says.

        A GPU says so from the first job on: asking costs a context on it, and some hundred MB.
        """
        device = self._parts.device
        found = self._parts.engines.available_bytes()
        if found is None and not device.is_gpu:
            found = available_ram_bytes()
        return device.memory_gb if found is None else min(device.memory_gb, found / 1e9)

    def _is_on_box(self, files: Sequence[ModelFile]) -> bool:
        return all(self._parts.store.is_verified(file) for file in files)

    def _held_back(self, model: str, source: ModelSource, task: ImageTask) -> Refusal | None:
        fetches = not all(map(is_data_url, task.input_urls)) or not self._is_on_box(source.files)
        return self._health.refusal(model, source, task, fetches=fetches)

    def _needed_gb(self, source: ModelSource, task: ImageTask) -> float | None:
        """What a job needs of the device's memory at least; ``None`` where its files are not here to tell."""
        if not source.files or not self._is_on_box(source.files):
            return None
        files = [
            LocalFile(file.role, self._parts.store.path(file), file.sha256 or file.url)
            for file in source.files
        ]
        return self._estimated_gb(self._estimates, files, source, task)

    def _previewed(self, source: ModelSource, task: ImageTask) -> Need | None:
        """What a job needs by the headers of its files; ``None`` where they are here, or cannot be had."""
        previews, started = self._parts.store.previews, time.monotonic()
        if source.engine not in JUDGED or not previews.are_of_use(source.files):
            return None
        # Of its own: what it remembers are files that are gone when it has told.
        estimates = Estimates(self._parts.device, self._parts.engines.peaks)
        try:
            with previews.shown(source.files) as preview:
                facts = {"op": "job", "bytes": preview.received_bytes}
                facts["elapsed_ms"] = round((time.monotonic() - started) * 1000)
                log.info("offer judged by its headers", extra=facts)
                sizes = [local.path.stat().st_size for local in preview.files]
                needed_gb = self._estimated_gb(estimates, preview.files, source, task)
        except (DownloadError, OSError) as error:
            log.info("offer judged without its headers", extra={"op": "job", "error": str(error)})
            return None
        sized = [
            dataclasses.replace(file, approx_bytes=size)
            for file, size in zip(source.files, sizes, strict=True)
        ]
        return Need(needed_gb, self._parts.store.shortfall_bytes(sized))

    def _estimated_gb(
        self, estimates: Estimates, files: Sequence[LocalFile], source: ModelSource, task: ImageTask
    ) -> float | None:
        needed_bytes = estimates.needed_bytes(files, task, source.cli_defaults, source.engine)
        return None if needed_bytes is None else needed_bytes / 1e9


def _username() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a passwd entry
        return "unknown"
