"""What a queue in PostgreSQL costs at the least: claim with ``SKIP LOCKED``, work, note that it is done.

No sessions, no turns, no priorities, no pictures, no faults: as many clients as the farm has workers, each on
a connection of its own, two transactions a job.
"""

from __future__ import annotations

import asyncio
import random
import time

import psycopg

_TABLE = (
    "CREATE TABLE bare_jobs (id bigint PRIMARY KEY, status text NOT NULL, worker integer, done_at float8)"
)
_INDEX = "CREATE INDEX ON bare_jobs (id) WHERE status = 'queued'"
_FILL = "INSERT INTO bare_jobs SELECT n, 'queued' FROM generate_series(1, %s) AS n"
_CLAIM = """
UPDATE bare_jobs SET status = 'running', worker = %s WHERE id = (
    SELECT id FROM bare_jobs WHERE status = 'queued' ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING id"""
_DONE = "UPDATE bare_jobs SET status = 'done', done_at = extract(epoch FROM clock_timestamp()) WHERE id = %s"


def jobs_per_second(url: str, *, jobs: int, clients: int, makes_s: float) -> float:
    """How fast so many clients are through; each works on a job for ``makes_s`` on average."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS bare_jobs")
        connection.execute(_TABLE)
        connection.execute(_INDEX)
        connection.execute(_FILL, (jobs,))
        connection.execute("ANALYZE bare_jobs")
    seconds = asyncio.run(_all(url, clients, makes_s))
    return jobs / seconds


async def _all(url: str, clients: int, makes_s: float) -> float:
    connections = [
        await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=1)
        for _ in range(clients)
    ]
    began = time.monotonic()
    await asyncio.gather(*(_client(number, each, makes_s) for number, each in enumerate(connections)))
    seconds = time.monotonic() - began
    for each in connections:
        await each.close()
    return seconds


async def _client(number: int, connection: psycopg.AsyncConnection, makes_s: float) -> None:
    chance = random.Random(number)
    while (row := await (await connection.execute(_CLAIM, (number,))).fetchone()) is not None:
        if makes_s:
            await asyncio.sleep(makes_s * chance.uniform(0.5, 1.5))
        await connection.execute(_DONE, row)
