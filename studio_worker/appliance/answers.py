"""What the running service answers over its control socket: status, pause, resume.

Joins the record of what is done with the facts that live elsewhere: the process, the outbox, the device.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from studio_worker import __version__
from studio_worker.appliance.pause_note import PauseNote
from studio_worker.box.device import Device
from studio_worker.engine import Router
from studio_worker.report.activity import Activity
from studio_worker.report.notify import ReadyLine
from studio_worker.report.snapshot import (
    DeviceFacts,
    GpuFacts,
    HealthFacts,
    OutboxFacts,
    ProcessFacts,
    ResidentModel,
    Snapshot,
)
from studio_worker.report.starts import Starts
from studio_worker.spool.outbox import Outbox
from studio_worker.studio.session.offers import AlreadyOurs, Impossible, Judgement, Refuse, Take
from studio_worker.work.desk import Desk

_STARTED_AT, _STARTED = time.time(), time.monotonic()
"""When this module came in, right after the process began."""

log = logging.getLogger(__name__)


def early_handlers(activity: Activity, starts: Starts) -> dict[str, Callable[[], Mapping[str, Any]]]:
    """What the control socket serves before the device is known: what is waited for."""

    def status() -> Mapping[str, Any]:
        facts = {"version": __version__, "process": _process(starts)}
        return activity.snapshot().model_copy(update=facts).model_dump(mode="json")

    return {"status": status}


class Reporting:
    """Answers for one running service. Safe from any thread.

    Args:
        gpu: what is known of a GPU's temperature and use.
        health: what the last jobs say of this box.
        studio: its address, as it may be shown.
        uploading: the job whose upload is under way, if any.
        on_pause: called when pause has changed.
    """

    def __init__(
        self,
        activity: Activity,
        *,
        starts: Starts,
        outbox: Outbox,
        desk: Desk,
        device: Device,
        gpu: Callable[[], GpuFacts | None],
        engines: Router,
        health: Callable[[], HealthFacts],
        studio: str,
        uploading: Callable[[], str | None],
        pause_note: PauseNote,
        on_pause: Callable[[], None],
    ) -> None:
        self._activity = activity
        self._starts = starts
        self._outbox = outbox
        self._desk = desk
        self._device = device
        self._gpu = gpu
        self._engines = engines
        self._health = health
        self._studio = studio
        self._uploading = uploading
        self._pause_note = pause_note
        self._on_pause = on_pause

    def handlers(self) -> dict[str, Callable[[], Mapping[str, Any]]]:
        """What the control socket serves."""
        return {
            "status": lambda: self.snapshot().model_dump(mode="json"),
            "pause": lambda: self._set_paused(True),
            "pause-lasting": self._pause_for_good,
            "resume": lambda: self._set_paused(False),
        }

    def snapshot(self) -> Snapshot:
        """Everything at this moment."""
        waiting = self._outbox.usage()
        return self._activity.snapshot().model_copy(
            update={
                "version": __version__,
                "studio": self._studio,
                "process": _process(self._starts),
                "health": self._health(),
                "outbox": OutboxFacts(
                    count=waiting.count,
                    size_bytes=waiting.size_bytes,
                    oldest_at=waiting.oldest_at,
                    uploading=self._uploading(),
                ),
                "device": DeviceFacts(
                    name=self._device.name,
                    description=self._device.description,
                    total_bytes=round(self._device.memory_gb * 1e9),
                    used_bytes=self._engines.used_bytes(),
                    gpu=self._gpu(),
                ),
                "resident": tuple(
                    ResidentModel(
                        model=model,
                        size_bytes=found.size_bytes,
                        place=found.place,
                        unpacked=found.is_unpacked,
                    )
                    for model, found in self._engines.resident().items()
                ),
            }
        )

    def begin_paused(self) -> None:
        """Where the operator wished so, before the last start."""
        if self._pause_note.is_set:
            log.warning(
                "paused since before this start", extra={"op": "pause", "cure": "studio-worker resume"}
            )
            self._desk.pause()
            self._activity.was_paused(True)

    def _pause_for_good(self) -> dict[str, Any]:
        answer = self._set_paused(True)
        try:
            self._pause_note.set()
        except OSError as error:
            return {**answer, "problem": error.strerror}
        return answer

    def _set_paused(self, paused: bool) -> dict[str, Any]:
        if paused:
            self._desk.pause()
        else:
            self._pause_note.clear()
            self._desk.resume()
        self._activity.was_paused(paused)
        self._on_pause()
        now = self._activity.snapshot()
        return {"paused": paused, "phase": now.phase, "job_id": self._desk.current_job_id}


def note_answer(activity: Activity, line: ReadyLine, judgement: Judgement, model: str) -> None:
    """Note how an offer of a job for ``model`` was answered; the status line says what keeps jobs away."""
    match judgement:
        case Take():
            activity.offer_answered("accepted")
            line.note("offers", "")
        case AlreadyOurs():
            activity.offer_answered("again")
        case Impossible(job_id, error):
            activity.offer_answered("impossible")
            activity.job_failed(job_id, model, error, retryable=False, handed_back=False)
        case Refuse():
            activity.offer_answered("rejected", judgement.code)
            if not judgement.is_routine:
                line.note("offers", f"the last offer was refused: {judgement.reason}")


def _process(starts: Starts) -> ProcessFacts:
    return ProcessFacts(
        pid=os.getpid(),
        started_at=_STARTED_AT,
        uptime_s=time.monotonic() - _STARTED,
        memory_bytes=_resident_set_bytes(),
        starts=starts.count,
        crashes=starts.crashes,
        last_crash_at=starts.last_crash_at,
    )


def _resident_set_bytes() -> int:
    """Memory of this process (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
