"""A studio carried to another database: what arrives, what is refused, what a killed attempt leaves."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest
from sqlalchemy import select

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio
from studio_worker.local_studio.carrying import carry, standing_still
from studio_worker.local_studio.pictures import Folder, StorageFull, StoredBytes
from studio_worker.local_studio.rules import JobStatus
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.sqlite import SqliteFile
from studio_worker.local_studio.storage.tables import METADATA, files, jobs, meta, results
from tests.fakes.machine import PICTURE, Machine, queue


def nothing() -> None:
    pass


def carried(source: Path, there: Path, store: Folder | None = None) -> list[str]:
    """Carry a studio's file into a folder; returns what was told."""
    told: list[str] = []
    kept = Folder(there / "pictures")
    with (
        closing(SqliteFile(there / "studio.sqlite3", nothing, kept)) as target,
        standing_still(source) as copy,
    ):
        carry(copy, Folder(source.parent / "pictures"), target, store or kept, told.append)
    return told


def rows_of(database: Database) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, but for what pictures are called."""
    with database.reading() as connection:
        found = {
            table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for table in METADATA.sorted_tables
        }
    for name in (results.name, files.name):
        for row in found[name]:
            del row["key"]
    return {name: sorted(rows, key=repr) for name, rows in found.items()}


def prints(folder: Path) -> dict[str, tuple[str, int]]:
    """What lies in a folder, by name: its hash, and when it was changed."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(params=["older", "before_revisions", "present"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A studio's file of the first form, of the last one before revisions, and of today."""
    name = request.param
    path: Path = request.getfixturevalue("older" if name == "present" else name)
    here = tmp_path / "here"
    here.mkdir()
    for each in (path, path.parent / "pictures"):
        if each.exists():
            each.rename(here / each.name)
    if name == "present":
        SqliteFile(here / path.name, nothing, Folder(here / "pictures")).close()
    return here / path.name


def test_everything_arrives_and_the_source_is_as_it_was(source: Path, tmp_path: Path) -> None:
    """Each row and picture of a studio of any form is in the new place, and the old one is as it was."""
    before = prints(source.parent)
    carried(source, tmp_path / "there")
    assert prints(source.parent) == before
    file, folder = tmp_path / "there" / "studio.sqlite3", Folder(tmp_path / "there" / "pictures")
    with closing(SqliteFile(file, nothing, folder)) as target:
        arrived = rows_of(target)
        with target.reading() as connection:
            keys = connection.execute(select(results.c.key)).scalars().all()
            keys += connection.execute(select(files.c.key)).scalars().all()
    contents = []
    for key in keys:
        with folder.open(key).content as content:
            contents.append(content.read())
    assert contents == [PICTURE, b"\x89PNG\r\n\x1a\n"]
    with closing(SqliteFile(source, nothing, Folder(source.parent / "pictures"))) as was:
        assert arrived == rows_of(was)
    assert len(arrived["jobs"]) == 4


@pytest.mark.sqlite
def test_carried_studio_goes_on(tmp_path: Path) -> None:
    """An approved worker needs no new approval; what waited is offered, and what was done is there."""
    with LocalStudio(tmp_path / "here" / "studio.sqlite3") as studio:
        machine = Machine(studio).connect()
        done, waiting = queue(studio), queue(studio)
        machine.take()
        assert machine.upload(done).status_code == 200
        machine.hang_up()
    carried(tmp_path / "here" / "studio.sqlite3", tmp_path / "there")
    with LocalStudio(tmp_path / "there" / "studio.sqlite3") as studio:
        assert studio.result(done) == PICTURE
        machine.studio, machine.api = studio, f"{studio.base_url}/graphics/api"
        machine.connect()
        assert machine.take()["jobId"] == waiting
        assert queue(studio) not in {done, waiting}
        machine.hang_up()


def test_target_with_anything_in_it_is_refused(source: Path, tmp_path: Path) -> None:
    """What is in the new place already is neither mixed up nor lost."""
    carried(source, tmp_path / "there")
    before = prints(tmp_path / "there" / "pictures")
    with pytest.raises(ConfigError, match=r"the database there is not empty: it has .*; name a new one"):
        carried(source, tmp_path / "there")
    assert prints(tmp_path / "there" / "pictures") == before


@pytest.mark.sqlite
def test_studio_at_work_is_not_carried(tmp_path: Path) -> None:
    """A studio that runs would go on writing to what is left behind."""
    with LocalStudio(tmp_path / "here" / "studio.sqlite3") as studio:
        with pytest.raises(ConfigError, match="--from: a studio is at work there; stop it first"):
            carried(tmp_path / "here" / "studio.sqlite3", tmp_path / "there")
        queue(studio)


def test_folder_without_a_studio_is_a_clear_mistake(tmp_path: Path) -> None:
    """A folder with no studio in it, or a file that is none, is named."""
    with pytest.raises(ConfigError, match="holds no studio that can be read"):
        carried(tmp_path / "nowhere" / "studio.sqlite3", tmp_path / "there")
    (tmp_path / "studio.sqlite3").write_bytes(b"no database at all, and long enough to look like none" * 20)
    with pytest.raises(ConfigError, match="file is not a database"):
        carried(tmp_path / "studio.sqlite3", tmp_path / "there")


class Filling(Folder):
    """A disk with room for one more picture."""

    room = 1

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        if self.room == 0:
            raise StorageFull("full")
        self.room -= 1
        return super().put(content, name, ext)


def test_storage_that_fills_up_leaves_nothing(older: Path, tmp_path: Path) -> None:
    """Where pictures do not all go in, none stays, no row goes, and a second attempt succeeds."""
    there = tmp_path / "there"
    with pytest.raises(StorageFull):
        carried(older, there, Filling(there / "pictures"))
    assert prints(there / "pictures") == {}
    carried(older, there)
    assert len(prints(there / "pictures")) == 2


_KILLED = """
import os, signal, sys
from contextlib import closing
from pathlib import Path
from studio_worker.local_studio.carrying import carry, standing_still
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.storage.sqlite import SqliteFile
source, there = Path(sys.argv[1]), Path(sys.argv[2])
def tell(text):
    if text.startswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
store = Folder(there / "pictures")
target = SqliteFile(there / "studio.sqlite3", lambda: None, store)
with standing_still(source) as copy:
    carry(copy, Folder(source.parent / "pictures"), target, store, tell)
"""


@pytest.mark.parametrize("stage", ["pictures: 2", "jobs: 4", "results: 1"])
def test_killed_attempt_leaves_an_empty_target(older: Path, tmp_path: Path, stage: str) -> None:
    """Killed at any point the new database is as empty as before, and the next attempt carries everything."""
    before = prints(older.parent)
    there = tmp_path / "there"
    there.mkdir()
    command = [sys.executable, "-c", _KILLED, older, there, stage]
    environment = {**os.environ, "TMPDIR": str(there)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -9, done.stderr
    assert before.items() <= prints(older.parent).items()
    with closing(sqlite3.connect(there / "studio.sqlite3")) as connection:
        for table in METADATA.sorted_tables:
            assert (
                connection.execute(f"SELECT count(*) FROM {table.name}").fetchone()[0] == 0
            ) or table is meta
    carried(older, there)
    with closing(SqliteFile(there / "studio.sqlite3", nothing, Folder(there / "pictures"))) as target:
        assert len(rows_of(target)[jobs.name]) == 4
        assert {row["status"] for row in rows_of(target)[jobs.name]} == {
            JobStatus.DONE,
            JobStatus.FAILED,
            JobStatus.QUEUED,
        }
