"""An offer's claim, as a worker reads it."""

from __future__ import annotations

from typing import Any

from studio_worker.local_studio.rules import QueuedJob

URL_FIELDS = ("initImageUrl", "maskUrl", "refImageUrl", "inputUrl")
"""Of a task: what the worker fetches for it."""


def claim_of(job: QueuedJob, base_url: str) -> dict[str, Any]:
    """An offer's claim. Addresses that begin with ``/`` are this studio's own, completed for the worker."""

    def absolute(address: Any) -> Any:
        return base_url + address if isinstance(address, str) and address.startswith("/") else address

    task = {key: absolute(value) if key in URL_FIELDS else value for key, value in job.task.items()}
    source = dict(job.model_source)
    source["files"] = [{**file, "url": absolute(file.get("url"))} for file in source.get("files", ())]
    return {
        "jobId": job.job_id,
        "gameId": job.game_id,
        "assetName": job.asset_name,
        "model": job.model,
        "vramGbEstimate": job.vram_gb_estimate,
        "task": {"kind": job.kind, **task},
        "modelSource": source,
    }
