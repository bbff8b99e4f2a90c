"""A database server that is away, as a studio process feels it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest

from studio_worker.local_studio.pictures import StorageAway
from studio_worker.local_studio.storage.gate import ASKED_EVERY_S
from studio_worker.local_studio.storage.postgres import PostgresDatabase
from tests.farm.front import Front
from tests.farm.postgres import Cluster

LIMIT_S = 60.0


@pytest.fixture
def front(postgres: Cluster) -> Iterator[Front]:
    with Front() as running:
        running.serve([postgres.port])
        yield running


@pytest.fixture
def database(front: Front, postgres: Cluster) -> Iterator[PostgresDatabase]:
    name = postgres.create()
    running = PostgresDatabase(f"postgresql://studio@127.0.0.1:{front.port}/{name}", lambda: None)
    yield running
    running.close()
    postgres.drop(name)


def test_database_that_is_away_is_not_dialled_by_everybody(
    front: Front, database: PostgresDatabase, postgres: Cluster
) -> None:
    """While the server does not answer everybody is told so at once; when it is back, all goes on."""
    database.check()
    front.cut()
    before, began = front.dialled, time.monotonic()
    for _ in range(100):
        with pytest.raises(StorageAway):
            database.check()
    assert front.dialled - before <= 2 + (time.monotonic() - began) / ASKED_EVERY_S
    front.serve([postgres.port])
    while True:
        try:
            database.check()
        except StorageAway:
            assert time.monotonic() < began + LIMIT_S
        else:
            break


def test_row_that_is_not_let_go_of_holds_nobody_for_ever(
    database: PostgresDatabase, postgres: Cluster
) -> None:
    """A process that hangs in the middle of a step holds up the others for seconds, and not until it ends."""
    with psycopg.connect(postgres.url(str(database.url.database))) as hung:
        hung.execute("LOCK TABLE meta")
        with pytest.raises(StorageAway, match="lock"), database.writing() as connection:
            connection.exec_driver_sql("UPDATE meta SET value = value")
