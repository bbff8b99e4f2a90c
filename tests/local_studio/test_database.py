"""Files that an earlier version of the local studio has written."""

from __future__ import annotations

import errno
import sqlite3
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.rules import JobStatus
from studio_worker.local_studio.storage.tables import METADATA
from tests.fakes.machine import PICTURE, Machine

pytestmark = pytest.mark.sqlite


@pytest.mark.parametrize("form", ["older", "before_revisions"])
def test_older_file_is_taken_over(request: pytest.FixtureRequest, form: str) -> None:
    """An older file is brought up to date at the start, and everything in it is still there."""
    older: Path = request.getfixturevalue(form)
    with LocalStudio(older) as studio:
        assert studio.queue.counts() == {"queued": 2, "offered": 0, "running": 0, "done": 1, "failed": 1}
        assert studio.result("done") == PICTURE
        assert [worker.name for worker in studio.workers()] == ["attic"]
        assert [model.model_id for model in studio.models()] == ["placeholder"]
        (waiting, rejected) = studio.jobs(JobStatus.QUEUED)
        assert (waiting.job_id, waiting.priority, waiting.submitter) == ("waiting", 0, "")
        assert [said.reason for said in rejected.rejections.values()] == ['needs 40 GB, "they" say']
        found = studio.shelf.picture("input")
        assert found is not None
        with studio.pictures.open(found.key).content as content:
            assert (found.media_type, content.read()) == ("image/png", b"\x89PNG\r\n\x1a\n")
        assert len(list((older.parent / "pictures").glob("*-*"))) == 2
        machine = Machine(studio).connect()
        assert machine.take()["jobId"] == "waiting"
        machine.hang_up()
    with LocalStudio(older) as studio:
        assert studio.queue.counts()["done"] == 1


def test_studio_that_was_stopped_may_be_stopped_again(tmp_path: Path) -> None:
    """Stopped twice, a studio is stopped."""
    with LocalStudio(tmp_path / "studio.sqlite3") as studio:
        studio.stop()


def test_older_file_that_finds_no_room_is_left_as_it_is(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full while pictures go into their folder loses none; the next start goes on."""

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("studio_worker.files.os.fsync", full_disk)
        with pytest.raises(ConfigError, match="make room"):
            LocalStudio(older)
    with LocalStudio(older) as studio:
        assert studio.result("done") == PICTURE


@pytest.mark.parametrize("form", ["new", "older", "before_revisions"])
def test_every_file_gets_the_tables_that_the_program_knows(
    request: pytest.FixtureRequest, tmp_path: Path, form: str
) -> None:
    """Old and new files have the same tables in the end, those that are asked for, with the same indexes."""
    path = tmp_path / "studio.sqlite3" if form == "new" else request.getfixturevalue(form)
    LocalStudio(path).stop()
    engine = create_engine(f"sqlite:///{path}")
    found = inspect(engine)
    names = set(found.get_table_names())
    columns = {name: {column["name"] for column in found.get_columns(name)} for name in names}
    indexes = {index["name"] for name in names for index in found.get_indexes(name)}
    engine.dispose()
    del columns["alembic_version"]
    assert columns == {table.name: set(table.columns.keys()) for table in METADATA.sorted_tables}
    assert indexes == {
        *("jobs_by_end", "jobs_by_line", "jobs_by_worker", "jobs_not_rejected", "jobs_rejected"),
        *("registrations_by_install", "turns_by_number"),
    }


def test_file_of_a_later_version_is_a_clear_mistake(older: Path) -> None:
    """A file that a later version has written is left as it is."""
    LocalStudio(older).stop()
    with sqlite3.connect(older) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="later version"):
        LocalStudio(older)


def test_file_is_of_a_later_version_for_programs_of_before(tmp_path: Path) -> None:
    """A program that knows no revisions refuses a file that has them, as one of a later schema than its 3."""
    path = tmp_path / "studio.sqlite3"
    LocalStudio(path).stop()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() > (3,)


@pytest.mark.parametrize("address", ["mysql://host/farm", "postgresql:/host", "farm"])
def test_address_that_is_none_of_a_database_is_a_clear_mistake(tmp_path: Path, address: str) -> None:
    """What is no address of PostgreSQL is refused, with what one looks like."""
    with pytest.raises(ConfigError, match="postgresql://"):
        LocalStudio(Places(address, Folder(tmp_path)))


def test_database_without_its_driver_is_a_clear_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PostgreSQL's driver is not installed the package that has it is named."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match="studio-worker-farm"):
        LocalStudio(Places("postgresql://host/farm", Folder(tmp_path)))


def test_database_that_has_no_folder_wants_to_know_where_pictures_go() -> None:
    """On PostgreSQL there is no folder beside the database, and none is invented."""
    with pytest.raises(ConfigError, match="--pictures"):
        LocalStudio(Places("postgresql://host/farm"))
