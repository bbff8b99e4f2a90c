"""What people and workers put down: the model registry, input pictures, shipped log lines."""

from __future__ import annotations

import io
import re
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL import Image
from sqlalchemy import bindparam, delete, func, insert, select

from studio_worker.errors import ProtocolError
from studio_worker.local_studio.claim import URL_FIELDS
from studio_worker.local_studio.pictures import Pictures
from studio_worker.local_studio.rules import QueuedJob
from studio_worker.local_studio.storage.database import Database, upsert
from studio_worker.local_studio.storage.tables import files, logs, models
from studio_worker.studio import wire

MAX_LOG_LINES = 5000
"""Shipped lines kept over all workers; the oldest go first."""

MAX_BATCH_LINES = 500
"""Lines kept of one batch: its newest."""

MAX_MESSAGE_CHARS = 4000

FILE_PATH = re.compile(r"/files/([A-Za-z0-9_-]+)")
"""Of an input picture, with its id."""

_ADDRESS = re.compile(rf"(?i:https?)://[^?#]*({FILE_PATH.pattern})")
"""The same behind whatever name somebody has for this studio."""

_PICTURES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


_MODEL = select(models).where(models.c.model_id == bindparam("wanted"))


class NotAPicture(ProtocolError):
    """The bytes are no PNG, JPEG, WebP or GIF."""


@dataclass(frozen=True)
class Model:
    """A model that the page offers. ``model_source`` is an offer's ``modelSource``."""

    model_id: str
    label: str
    model_source: Mapping[str, Any]
    vram_gb_estimate: float


@dataclass(frozen=True)
class StoredFile:
    """An input picture."""

    media_type: str
    key: str


@dataclass(frozen=True)
class LogLine:
    """One shipped log line; ``ts`` as the worker wrote it (ISO 8601, UTC)."""

    worker_id: str
    ts: str
    level: str
    category: str
    message: str
    job_id: str | None


class Shelf:
    """Models, files and logs."""

    def __init__(self, database: Database, pictures: Pictures) -> None:
        self._database = database
        self._pictures = pictures

    def put_model(self, model: Model) -> None:
        """Add a model, or replace the one of the same id."""
        with self._database.writing() as connection:
            upsert(connection, models, vars(model))

    def delete_model(self, model_id: str) -> bool:
        """Forget a model; jobs keep the source they were queued with. False where it is unknown."""
        with self._database.writing() as connection:
            return connection.execute(delete(models).where(models.c.model_id == model_id)).rowcount == 1

    def models(self) -> list[Model]:
        """All models, by label."""
        by_label = select(models).order_by(func.lower(models.c.label), models.c.model_id)
        with self._database.reading() as connection:
            return [Model(**row) for row in connection.execute(by_label).mappings()]

    def model(self, model_id: str) -> Model | None:
        """One model."""
        with self._database.reading() as connection:
            row = connection.execute(_MODEL, {"wanted": model_id}).mappings().first()
        return None if row is None else Model(**row)

    def add_picture(self, content: bytes) -> str:
        """Keep an input picture; returns its id, which nobody can guess.

        Raises:
            NotAPicture: judged by its content, whatever the sender called it.
        """
        try:
            with warnings.catch_warnings():
                # Only the header is read here; a picture that is large is not yet a bomb.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(content), formats=list(_PICTURES)) as picture:
                    media_type = _PICTURES[str(picture.format)]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise NotAPicture("not a PNG, JPEG, WebP or GIF picture") from error
        file_id = secrets.token_urlsafe(18)
        stored = self._pictures.put(io.BytesIO(content), "input", media_type.rpartition("/")[2])
        with self._database.writing() as connection:
            connection.execute(
                insert(files).values(
                    file_id=file_id, media_type=media_type, created_at=time.time(), key=stored.key
                )
            )
        return file_id

    def picture(self, file_id: str) -> StoredFile | None:
        """An input picture."""
        named = select(files.c.media_type, files.c.key).where(files.c.file_id == file_id)
        with self._database.reading() as connection:
            row = connection.execute(named).first()
        return None if row is None else StoredFile(row.media_type, row.key)

    def by_path(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """The task with this studio's own pictures named by their paths. Whoever put one down may know the
        studio by a name, or a process of it, that no worker knows.
        """
        return {name: self._path(said) if name in URL_FIELDS else said for name, said in task.items()}

    def _path(self, said: Any) -> Any:
        named = _ADDRESS.fullmatch(said) if isinstance(said, str) else None
        return named[1] if named and self.picture(named[2]) else said

    def addressed(self, job: QueuedJob) -> QueuedJob:
        """The job as it is offered: input pictures that a worker can get from the storage itself have their
        addresses there, good for a while; the others stay this studio's.
        """
        task = {name: self._address(said) if name in URL_FIELDS else said for name, said in job.task.items()}
        return replace(job, task=task)

    def _address(self, said: Any) -> Any:
        file_id = FILE_PATH.fullmatch(said) if isinstance(said, str) else None
        found = self.picture(file_id[1]) if file_id else None
        return (self._pictures.address(found.key) if found else None) or said

    def delete_picture(self, file_id: str) -> bool:
        """Forget an input picture. False where it is unknown."""
        found = self.picture(file_id)
        if found is None:
            return False
        with self._database.writing() as connection:
            connection.execute(delete(files).where(files.c.file_id == file_id))
        self._pictures.delete(found.key)
        return True

    def delete_logs(self, before: str) -> None:
        """Forget lines of before that moment (ISO 8601, UTC), by the workers' own clocks."""
        with self._database.writing() as connection:
            connection.execute(delete(logs).where(logs.c.ts < before))

    def add_logs(self, worker_id: str, entries: Iterable[wire.LogEntry]) -> None:
        """Keep a worker's log lines, within bounds."""
        lines = [
            {
                "worker_id": worker_id,
                "ts": entry.ts[:40],
                "level": entry.level,
                "category": entry.category[:100],
                "message": entry.message[:MAX_MESSAGE_CHARS],
                "job_id": entry.job_id and entry.job_id[:100],
            }
            for entry in list(entries)[-MAX_BATCH_LINES:]
        ]
        if not lines:
            return
        newest = select(func.max(logs.c.id)).scalar_subquery()
        with self._database.writing() as connection:
            connection.execute(insert(logs), lines)
            connection.execute(delete(logs).where(logs.c.id <= newest - MAX_LOG_LINES))

    def logs(self, worker_id: str | None = None, limit: int = 200) -> list[LogLine]:
        """The newest shipped lines, oldest first."""
        newest = select(*(logs.c[field.name] for field in fields(LogLine))).order_by(logs.c.id.desc())
        if worker_id is not None:
            newest = newest.where(logs.c.worker_id == worker_id)
        with self._database.reading() as connection:
            lines = [LogLine(**row) for row in connection.execute(newest.limit(limit)).mappings()]
        return lines[::-1]
