"""The server that the tests of the farm start themselves."""

from __future__ import annotations

import psycopg
import pytest

from tests.farm.postgres import Cluster


def test_cluster_gives_each_test_a_database_of_its_own(postgres: Cluster, database_url: str) -> None:
    """What one test writes no other sees, but for what it had copied on purpose."""
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE mine (n integer)")
        name = connection.info.dbname
    copy, fresh = postgres.create(template=name), postgres.create()
    with psycopg.connect(postgres.url(copy)) as connection:
        assert connection.execute("SELECT count(*) FROM mine").fetchone() == (0,)
    with psycopg.connect(postgres.url(fresh)) as connection, pytest.raises(psycopg.errors.UndefinedTable):
        connection.execute("SELECT count(*) FROM mine")
    postgres.drop(copy)
    postgres.drop(fresh)


@pytest.mark.parametrize("is_crash", [False, True], ids=["stopped", "crashed"])
def test_cluster_that_ended_keeps_what_was_committed(
    postgres: Cluster, database_url: str, is_crash: bool
) -> None:
    """A restart breaks connections, by socket and by port, and loses nothing that was committed."""
    connection = psycopg.connect(database_url, autocommit=True)
    by_port = postgres.url(connection.info.dbname, tcp=True)
    connection.execute("CREATE TABLE mine (n integer)")
    connection.execute("INSERT INTO mine VALUES (7)")
    if is_crash:
        postgres.kill()
    else:
        postgres.stop()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT n FROM mine")
    postgres.start()
    with psycopg.connect(by_port) as again:
        assert again.execute("SELECT n FROM mine").fetchone() == (7,)
