"""Everything a person can do with the studio, as plain calls: the HTTP routes and Python callers share it."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

from studio_worker.jobs import ImageTask
from studio_worker.local_studio.attendance import Attendance
from studio_worker.local_studio.changes import Changes
from studio_worker.local_studio.facts import Facts, waiting_in
from studio_worker.local_studio.housekeeping import FOR_EVER, Housekeeping, Retention
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.limits import Limits
from studio_worker.local_studio.metrics import Metrics
from studio_worker.local_studio.pictures import CannotStore
from studio_worker.local_studio.places import Places, claim_pictures, open_places
from studio_worker.local_studio.presence import Presence
from studio_worker.local_studio.pulse import Pulse
from studio_worker.local_studio.registry import Registration, Registry
from studio_worker.local_studio.rules import JobExtras, JobStatus, QueuedJob
from studio_worker.local_studio.sessions import Sessions
from studio_worker.local_studio.shelf import LogLine, Model, Shelf
from studio_worker.local_studio.storage.postgres import PostgresDatabase
from studio_worker.local_studio.wake import Alone, Hint, Listening, Wake
from studio_worker.local_studio.web import bodies
from studio_worker.local_studio.web.views import Views
from studio_worker.local_studio.workers import RegisteredWorker
from studio_worker.models import ModelSource

logger = logging.getLogger(__name__)

PLACEHOLDER = Model(
    model_id="placeholder",
    label="Placeholder pictures (no model files)",
    model_source={"engine": "synthetic", "files": [], "cliDefaults": {}},
    vram_gb_estimate=0.0,
)
"""In every new studio, so that the way from the form to the gallery can be tried at once."""


class Studio:
    """The studio without its server. All methods may be called from any thread.

    Args:
        places: a SQLite file, made with its folder where it is missing; or what says where all is kept.

    Raises:
        ConfigError: the database cannot be used, or what keeps the pictures.
    """

    def __init__(
        self, places: Path | Places, limits: Limits | None = None, retention: Retention = FOR_EVER
    ) -> None:
        places = places if isinstance(places, Places) else Places(places)
        self.limits = limits or Limits()
        self.changes = Changes()
        self.wake: Wake = Alone()
        self.database, self.pictures = open_places(places, self._changed)
        if isinstance(self.database, PostgresDatabase):
            self.wake = Listening(self.database.url)
        try:
            claim_pictures(self.database, self.pictures)
        except BaseException:
            self.database.close()
            raise
        is_alone = not (self.pictures.is_shared or self.database.is_shared)
        if is_alone:
            self.pictures.clear_unfinished()
        self.registry = Registry(self.database)
        self.metrics = Metrics()
        self.queue = JobQueue(
            self.database, self.pictures, patience=self.limits.patience, on_step=self.metrics.stepped
        )
        self.shelf = Shelf(self.database, self.pictures)
        self.housekeeping = Housekeeping(self.database, self.queue, self.shelf, self.pictures, retention)
        self.presence = Presence(self.database, uuid.uuid4().hex, self.limits.lease_s)
        self.pulse = Pulse(self.presence, self.queue, self.limits.lease_s)
        self.attendance = Attendance(self.queue, self.presence, self.wake)
        self.sessions = Sessions(
            self.registry.workers,
            self.queue,
            self.shelf,
            self.presence,
            self.attendance,
            self.limits,
        )
        self.views = Views(self.queue)
        self.metrics.watch(self.facts)
        if self.database.is_new:
            self.shelf.put_model(PLACEHOLDER)
        elif is_alone:
            self.housekeeping.sweep(self.database.last_opened_at)

    def hear(self, hint: Hint) -> None:
        """Another process of this studio says that something is to be looked at."""
        if hint.kind in {"change", "look"}:
            self.changes.bump()
        self.attendance.hear(hint)

    def _changed(self) -> None:
        self.changes.bump()
        self.wake.tell(Hint("change"))

    def facts(self) -> Facts:
        """For the metrics, at the moment of asking."""
        states = Counter(session.state for session in list(self.attendance.live.values()))
        sessions = {"idle": 0, "working": 0, "paused": 0} | states
        try:
            return Facts(waiting_in(self.database), self.queue.counts(), sessions, len(self.pending()))
        except CannotStore:
            return Facts(sessions=sessions, has_database=False)

    # --- workers ------------------------------------------------------------------------------------

    def pending(self) -> list[Registration]:
        """Machines that ask to work here, oldest first."""
        return self.registry.pending()

    def approve(self, request_id: str) -> str:
        """Let a machine work here; returns its worker id. Raises UnknownRequest or NotPending."""
        worker_id = self.registry.approve(request_id)
        # A machine that asked again gets a new token; whoever still uses the old one is out.
        self.attendance.end(worker_id, "auth_failed")
        logger.info("worker approved", extra={"worker_id": worker_id, "request_id": request_id})
        return worker_id

    def reject(self, request_id: str, reason: str | None = None) -> None:
        """Refuse a machine. Raises UnknownRequest or NotPending."""
        self.registry.reject(request_id, reason)
        logger.info("worker rejected", extra={"request_id": request_id})

    def workers(self) -> list[RegisteredWorker]:
        """All workers, oldest first."""
        return self.registry.workers.all()

    def is_online(self, worker_id: str) -> bool:
        """Whether this worker has a session with any process of this studio."""
        return worker_id in self.presence.connected()

    def delete_worker(self, worker_id: str) -> None:
        """Dismiss a worker and end its session with ``worker_deleted``. Raises KeyError where unknown."""
        if not self.registry.workers.delete(worker_id):
            raise KeyError(worker_id)
        self.attendance.end(worker_id, "worker_deleted")
        logger.info("worker deleted", extra={"worker_id": worker_id})

    # --- jobs ---------------------------------------------------------------------------------------

    def queue_job(
        self,
        *,
        model: str,
        task: Mapping[str, Any] | ImageTask,
        model_source: Mapping[str, Any] | ModelSource | None = None,
        job_id: str | None = None,
        **extras: Unpack[JobExtras],
    ) -> str:
        """Queue a job; returns its id.

        Args:
            model_source: where it is missing, the registry's entry of ``model`` is taken.
            job_id: a new UUID that is this order's alone: the order may be repeated, and is one job.

        Raises:
            ValueError: the task or the model source is malformed, or the model is not in the registry.
            RuleBroken: another order has the id.
        """
        if isinstance(task, ImageTask):
            task = task.model_dump(mode="json", by_alias=True, exclude_none=True)
        if isinstance(model_source, ModelSource):
            model_source = model_source.model_dump(mode="json", by_alias=True, exclude_none=True)
        known = self.shelf.model(model)
        if model_source is None:
            if known is None:
                raise ValueError(f"model: {model!r} is not registered, and no modelSource was given")
            model_source = known.model_source
        estimate_gb = extras.get("vram_gb_estimate")
        if estimate_gb is None:
            estimate_gb = known.vram_gb_estimate if known else 0.0
        job = QueuedJob(
            job_id=job_id or str(uuid.uuid4()),
            model=model,
            task=self.shelf.by_path(bodies.checked_task(task)),
            model_source=bodies.checked_source(model_source),
            created_at=time.time(),
            game_id=extras.get("game_id") or "local",
            asset_name=extras.get("asset_name") or "picture",
            vram_gb_estimate=estimate_gb,
            max_attempts=extras.get("max_attempts") or self.limits.max_attempts,
            priority=extras.get("priority") or 0,
            submitter=extras.get("submitter") or "",
        )
        if self.queue.add(job):
            self.attendance.offer_idle(model)
            logger.info("job queued", extra={"job_id": job.job_id, "model": model})
        return job.job_id

    def job(self, job_id: str) -> QueuedJob:
        """One job. Raises KeyError where it is unknown."""
        job = self.queue.get(job_id)
        if job is None:
            raise KeyError(job_id)
        return job

    def jobs(self, status: JobStatus | None = None, limit: int = 100) -> list[QueuedJob]:
        """Jobs: the queued ones in the order of their turn, all others newest first."""
        return self.queue.listed(status, limit)

    def result(self, job_id: str) -> bytes:
        """The bytes a job brought. Raises KeyError where there are none yet."""
        key = self.queue.picture(job_id)
        if key is None:
            raise KeyError(job_id)
        with self.pictures.open(key).content as content:
            return content.read()

    def retry(self, job_id: str) -> None:
        """Queue a failed or rejected job again. Raises RuleBroken."""
        self.attendance.offer_idle(self.queue.retry(job_id).model)

    # --- models, pictures, logs ---------------------------------------------------------------------

    def register_model(
        self,
        model_id: str,
        model_source: Mapping[str, Any] | ModelSource,
        *,
        label: str = "",
        vram_gb_estimate: float = 0.0,
    ) -> None:
        """Offer a model in the form; one of the same id is replaced. Raises ValueError."""
        if isinstance(model_source, ModelSource):
            model_source = model_source.model_dump(mode="json", by_alias=True, exclude_none=True)
        source = bodies.checked_source(model_source)
        self.shelf.put_model(Model(model_id, label or model_id, source, vram_gb_estimate))

    def models(self) -> list[Model]:
        """All models the form offers."""
        return self.shelf.models()

    def add_picture(self, content: bytes) -> str:
        """Keep an input picture; returns its path here, good as ``initImageUrl`` or ``maskUrl``.

        Raises:
            NotAPicture: no PNG, JPEG, WebP or GIF.
        """
        return f"/files/{self.shelf.add_picture(content)}"

    def logs(self, worker_id: str | None = None, limit: int = 200) -> list[LogLine]:
        """The newest log lines that workers shipped, oldest first."""
        return self.shelf.logs(worker_id, limit)

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Block until the predicate holds; it is asked again at every change. Raises TimeoutError."""
        self.changes.wait_for(predicate, timeout_s)
