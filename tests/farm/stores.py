"""What a farm keeps its state in, as the simulation sees it: what to start studios with, and what to read."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from studio_worker.local_studio.server import DATABASE_NAME
from tests.farm import history
from tests.farm.history import History
from tests.farm.people import picture

_UNFINISHED = "SELECT count(*) FROM jobs WHERE status IN ('queued', 'offered', 'running')"
_KEYS = "SELECT job_id, key FROM results"


class Store(Protocol):
    """Database and pictures of one farm."""

    @property
    def options(self) -> Sequence[str]:
        """Of ``studio-worker local-studio``."""

    def watch(self) -> None:
        """Have the steps of jobs noted; the tables are there."""

    def unfinished(self) -> int | None:
        """How many jobs wait or are held; ``None`` while the database is away."""

    def history(self) -> History:
        """What was noted."""

    def stored(self) -> Collection[str]:
        """The jobs whose picture is there, byte for byte."""


class OneDesk:
    """The default: one SQLite file, and a folder beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / DATABASE_NAME

    @property
    def options(self) -> Sequence[str]:
        return ["--data", str(self._folder)]

    def watch(self) -> None:
        history.watch_sqlite(self._file)

    def unfinished(self) -> int | None:
        (row,) = self._rows(_UNFINISHED)
        return int(row[0])

    def history(self) -> History:
        return history.read_sqlite(self._file)

    def stored(self) -> Collection[str]:
        return whole(self._rows(_KEYS), self._folder / "pictures")

    def _rows(self, query: str) -> list[tuple[str, str]]:
        connection = sqlite3.connect(self._file, timeout=30)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()


def whole(keys: Sequence[tuple[str, str]], folder: Path) -> set[str]:
    """The jobs whose picture lies in this folder as their worker made it."""
    return {
        job_id
        for job_id, key in keys
        if (folder / key).is_file() and (folder / key).read_bytes() == picture(job_id)
    }
