"""How jobs, workers and requests look in the JSON that people and the page read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from studio_worker.local_studio.job_queue import JobQueue, Result
from studio_worker.local_studio.presence import Seat
from studio_worker.local_studio.registry import Registration
from studio_worker.local_studio.rules import JobStatus, QueuedJob
from studio_worker.local_studio.shelf import LogLine, Model
from studio_worker.local_studio.workers import RegisteredWorker


def moment(unix_s: float | None) -> str | None:
    """ISO 8601, UTC."""
    if unix_s is None:
        return None
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Views:
    """Facts from the database, put together for reading; it is asked once, however many are shown.
    ``connected`` are the workers with a session.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue

    def registration(self, registration: Registration) -> dict[str, Any]:
        """A machine that asks to work here."""
        capabilities = registration.capabilities
        return {
            "requestId": registration.request_id,
            "installId": registration.install_id,
            "machineName": capabilities.machine_name,
            "username": capabilities.username,
            "agentVersion": capabilities.agent_version,
            "vramTotalGb": capabilities.vram_total_gb,
            "taskKinds": capabilities.task_kinds,
            "requestedAt": moment(registration.created_at),
        }

    def workers(
        self, workers: Iterable[RegisteredWorker], connected: Mapping[str, Seat]
    ) -> list[dict[str, Any]]:
        """``state`` is ``offline``, ``paused``, ``working`` or ``idle``."""
        held = self._queue.held()
        return [_worker(each, connected.get(each.worker_id), held.get(each.worker_id)) for each in workers]

    def job(self, job: QueuedJob, names: Mapping[str, str], connected: Mapping[str, Seat]) -> dict[str, Any]:
        """One of :meth:`jobs`."""
        return self.jobs([job], names, connected)[0]

    def jobs(
        self, jobs: Sequence[QueuedJob], names: Mapping[str, str], connected: Mapping[str, Seat]
    ) -> list[dict[str, Any]]:
        """Jobs, with their results where there are; ``names`` maps worker ids to what people call them."""
        done = [job.job_id for job in jobs if job.status is JobStatus.DONE]
        results = self._queue.results(done) if done else {}
        return [self._job(job, results.get(job.job_id), names, connected) for job in jobs]

    def _job(
        self, job: QueuedJob, result: Result | None, names: Mapping[str, str], connected: Mapping[str, Seat]
    ) -> dict[str, Any]:
        return {
            "jobId": job.job_id,
            "status": job.status,
            "model": job.model,
            "modelSource": job.model_source,
            "task": job.task,
            "gameId": job.game_id,
            "assetName": job.asset_name,
            "vramGbEstimate": job.vram_gb_estimate,
            "attempts": job.attempts,
            "maxAttempts": job.max_attempts,
            "priority": job.priority,
            "submitter": job.submitter,
            "reason": job.reason,
            "waitingFor": _waiting_for(job, names, connected),
            "rejections": [
                {"workerId": who, "worker": names.get(who, said.name), "reason": said.reason}
                for who, said in job.rejections.items()
            ],
            "workerId": job.worker_id,
            "worker": None if job.worker_id is None else names.get(job.worker_id, job.worker_id),
            "createdAt": moment(job.created_at),
            "offeredAt": moment(job.offered_at),
            "startedAt": moment(job.started_at),
            "finishedAt": moment(job.finished_at),
            "completions": job.completions,
            "refusedUploads": job.refused_uploads,
            **self._result(result),
        }

    def _result(self, result: Result | None) -> dict[str, Any]:
        if result is None:
            return {"result": None, "generationMeta": None}
        facts = {
            "url": f"/api/jobs/{result.job_id}/result",
            "ext": result.ext,
            "prompt": result.prompt,
            "seconds": result.seconds,
            "sizeBytes": result.size_bytes,
        }
        return {"result": facts, "generationMeta": result.generation_meta}


def _worker(worker: RegisteredWorker, seat: Seat | None, held: QueuedJob | None) -> dict[str, Any]:
    if seat is None:
        state = "offline"
    elif held is not None or seat.current_job_id is not None:
        state = "working"
    else:
        state = "paused" if seat.is_paused else "idle"
    return {
        "workerId": worker.worker_id,
        "installId": worker.install_id,
        "name": worker.name,
        "state": state,
        "online": seat is not None,
        "paused": seat is not None and seat.is_paused,
        "currentJob": None if held is None else _in_hand(held),
        "currentJobId": seat and seat.current_job_id,
        "lastHeartbeatAt": moment(seat.heartbeat_at if seat else worker.last_seen_at),
        "approvedAt": moment(worker.created_at),
        "capabilities": worker.capabilities.model_dump(mode="json", by_alias=True),
    }


def _in_hand(job: QueuedJob) -> dict[str, Any]:
    return {
        "jobId": job.job_id,
        "status": job.status,
        "model": job.model,
        "prompt": job.task.get("prompt"),
        "since": moment(job.started_at or job.offered_at),
    }


def _waiting_for(job: QueuedJob, names: Mapping[str, str], connected: Mapping[str, Seat]) -> str | None:
    """Why a queued job is not being done, where that is known."""
    if job.status is not JobStatus.QUEUED:
        return None
    ready = [worker_id for worker_id, seat in connected.items() if not seat.is_paused]
    if job.rejections and all(worker_id in job.rejections for worker_id in ready):
        said = (f"{names.get(who, own.name)}: {own.reason}" for who, own in job.rejections.items())
        return f"rejected by {'; '.join(said)}"
    if not connected:
        return "no worker is connected"
    if not ready:
        return "all connected workers are paused"
    return None


def model(entry: Model) -> dict[str, Any]:
    """One model of the registry."""
    return {
        "id": entry.model_id,
        "label": entry.label,
        "modelSource": entry.model_source,
        "vramGbEstimate": entry.vram_gb_estimate,
    }


def log_line(line: LogLine, names: Mapping[str, str]) -> dict[str, Any]:
    """One shipped log line."""
    return {
        "workerId": line.worker_id,
        "worker": names.get(line.worker_id, line.worker_id),
        "ts": line.ts,
        "level": line.level,
        "category": line.category,
        "message": line.message,
        "jobId": line.job_id,
    }
