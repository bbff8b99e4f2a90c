"""What a PostgreSQL server refuses at the start, in words that help."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.local_studio import Places
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.studio import Studio
from tests.farm.postgres import USER, Cluster


def refused(address: str, tmp_path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Studio(Places(address, Folder(tmp_path)))
    return caught.value


def test_mistake_is_told_by_its_name(database_url: str, tmp_path: Path) -> None:
    """A user, a database or an option that is none is the operator's mistake, each with a cure of its own."""
    missing = database_url.replace("/test_", "/none_")
    stranger = database_url.replace(f"//{USER}@", "//stranger@")
    for address, cure in [
        (missing, "createdb"),
        (stranger, "make that user"),
        (f"{database_url}&sslmode=perhaps", "correct the address"),
    ]:
        error = refused(address, tmp_path)
        assert error.exit_status == 78, error
        assert cure in str(error)
        assert "does not answer" not in str(error)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_database_must_hold_every_prompt(postgres: Cluster, tmp_path: Path, encoding: str) -> None:
    """A database that is not in UTF-8 is refused at the start, not at a prompt that it cannot hold."""
    name = f"in_{encoding.lower()}"
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        )
    error = refused(postgres.url(name), tmp_path)
    postgres.drop(name)
    assert error.exit_status == 78
    assert f"its encoding is {encoding}" in str(error)
    assert "createdb --encoding=UTF8" in str(error)


def test_tables_of_another_program_are_left_alone(database_url: str, tmp_path: Path) -> None:
    """A database that has a table of such a name is told to be another's, and stays as it is."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE jobs (mine integer)")
        assert "name a database that is the studio's alone" in str(refused(database_url, tmp_path))
        count = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
    assert count == (1,)


def test_database_that_takes_nothing_now_may_come_back(database_url: str, tmp_path: Path) -> None:
    """A standby, or a database that is set to be read only, is waited for."""
    error = refused(f"{database_url}&options=-c%20default_transaction_read_only%3Don", tmp_path)
    assert isinstance(error, StateUnavailable)
    assert "takes nothing now" in str(error)
