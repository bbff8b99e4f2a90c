"""Failures that the studio has not heard of, remembered over a restart. Reports none itself."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

from studio_worker.files import make_private, write_atomic
from studio_worker.spool.notes import REMEMBERED_JOBS, read_note

log = logging.getLogger(__name__)


class Failures:
    """Failures that could not be reported, because the connection that held the job was gone.

    The studio has put such a job back. Offered here again, one that failed for good is not tried again.
    """

    def __init__(self, folder: Path) -> None:
        make_private(folder)
        self._path = folder / "failures.json"
        self._guard = threading.Lock()  # reported from several threads
        self._failures = read_note(self._path) or {}

    def add(self, job_id: str, error: str, *, retryable: bool) -> None:
        """Remember a failure; where the disk does not take it, for as long as the process lives."""
        failure = {"error": error, "retryable": retryable, "failed_at": time.time()}
        with self._guard:
            others = [item for item in self._failures.items() if item[0] != job_id]
            self._failures = dict([*others, (job_id, failure)][-REMEMBERED_JOBS:])
            try:
                write_atomic(self._path, json.dumps(self._failures).encode())
            except OSError as problem:
                facts = {"op": "spool", "path": str(self._path), "error": problem.strerror}
                log.error("failure cannot be noted", extra=facts)

    def final(self, job_id: str) -> str | None:
        """Why ``job_id`` failed for good here, or ``None``."""
        failure = self._failures.get(job_id)
        if isinstance(failure, dict) and failure.get("retryable") is False:
            return str(failure.get("error"))
        return None
