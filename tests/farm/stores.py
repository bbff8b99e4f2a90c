"""What a farm keeps its state in, as the simulation sees it: what to start studios with, and what to read."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import LiteralString, Protocol

import psycopg

from studio_worker.local_studio.places import DATABASE_NAME
from tests.farm import history
from tests.farm.history import History
from tests.farm.people import picture
from tests.farm.postgres import Cluster
from tests.farm.s3 import S3Server
from tests.farm.s3_proxy import S3Proxy

_UNFINISHED = "SELECT count(*), '' FROM jobs WHERE status IN ('queued', 'offered', 'running')"
_KEYS = "SELECT job_id, key FROM results"


class Store(Protocol):
    """Database and pictures of one farm."""

    @property
    def options(self) -> Sequence[str]:
        """Of ``studio-worker local-studio``."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What its processes find in their environment besides."""

    @property
    def faults(self) -> Mapping[str, Callable[[float], Awaitable[None]]]:
        """What can be done to database and pictures, by kind: given for how long."""

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

    @property
    def environment(self) -> Mapping[str, str]:
        return {}

    @property
    def faults(self) -> Mapping[str, Callable[[float], Awaitable[None]]]:
        return {}

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


class Shelves(Protocol):
    """Where a farm's pictures lie."""

    @property
    def address(self) -> str:
        """What ``--pictures`` is given."""

    @property
    def environment(self) -> Mapping[str, str]:
        """See :class:`Store`."""

    @property
    def faults(self) -> Mapping[str, Callable[[float], Awaitable[None]]]:
        """See :class:`Store`."""

    def whole(self, keys: Sequence[tuple[str, str]]) -> set[str]:
        """The jobs, given with their keys, whose picture is there as their worker made it."""


class OneDatabase:
    """A PostgreSQL database that all processes share."""

    def __init__(self, cluster: Cluster, folder: Path, shelves: Shelves) -> None:
        self._cluster = cluster
        self._url = cluster.url(cluster.create())
        self._folder = folder
        self._shelves = shelves

    @property
    def options(self) -> Sequence[str]:
        given = ["--database", self._url, "--pictures", self._shelves.address]
        return ["--data", str(self._folder), *given]

    @property
    def environment(self) -> Mapping[str, str]:
        return self._shelves.environment

    @property
    def faults(self) -> Mapping[str, Callable[[float], Awaitable[None]]]:
        own = {"restart database": self._restart, "crash database": self._crash}
        return own | dict(self._shelves.faults)

    def watch(self) -> None:
        history.watch_postgres(self._url)

    def unfinished(self) -> int | None:
        try:
            ((count, _),) = self._rows(_UNFINISHED)
        except psycopg.OperationalError:
            return None
        return int(count)

    def history(self) -> History:
        return history.read_postgres(self._url)

    def stored(self) -> Collection[str]:
        return self._shelves.whole(self._rows(_KEYS))

    async def _restart(self, seconds: float) -> None:
        await self._away(self._cluster.stop, seconds)

    async def _crash(self, seconds: float) -> None:
        await self._away(self._cluster.kill, seconds)

    async def _away(self, end: Callable[[], None], seconds: float) -> None:
        # In the loop's own thread, which holds the crowd up for as long: the server ends with the thread that
        # started it.
        end()
        await asyncio.sleep(seconds)
        self._cluster.start()

    def _rows(self, query: LiteralString) -> list[tuple[str, str]]:
        with psycopg.connect(self._url) as connection:
            return connection.execute(query).fetchall()


class SharedFolder:
    """A folder that all processes have."""

    environment: Mapping[str, str] = {}
    faults: Mapping[str, Callable[[float], Awaitable[None]]] = {}

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = str(folder)

    def whole(self, keys: Sequence[tuple[str, str]]) -> set[str]:
        return whole(keys, self._folder)


class Bucket:
    """A bucket of an S3 server, which a proxy before it refuses with 503 and takes away at times."""

    def __init__(self, server: S3Server, proxy: S3Proxy) -> None:
        self._server = server
        self._proxy = proxy
        self._bucket = server.bucket()
        self.address = f"s3://{self._bucket}/farm"
        self.environment: Mapping[str, str] = server.environment(proxy.url)
        self.faults: Mapping[str, Callable[[float], Awaitable[None]]] = {"no store": self._refuse}

    def whole(self, keys: Sequence[tuple[str, str]]) -> set[str]:
        tags = self._server.tags(self._bucket)
        # The tag of what came in one part is its MD5.
        return {
            job_id
            for job_id, key in keys
            if tags.get(f"farm/{key}") == hashlib.md5(picture(job_id), usedforsecurity=False).hexdigest()
        }

    async def _refuse(self, seconds: float) -> None:
        self._proxy.faults.refused = 1.0 if seconds < 2.0 else 0.5
        await asyncio.sleep(2 * seconds)
        self._proxy.faults.refused = 0.0


def whole(keys: Sequence[tuple[str, str]], folder: Path) -> set[str]:
    """The jobs whose picture lies in this folder as their worker made it."""
    return {
        job_id
        for job_id, key in keys
        if (folder / key).is_file() and (folder / key).read_bytes() == picture(job_id)
    }
