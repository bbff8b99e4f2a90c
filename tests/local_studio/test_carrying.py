"""A studio carried to another database: what arrives, what is refused, what a killed attempt leaves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places, carry_studio
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import Folder, StorageFull, StoredBytes
from studio_worker.local_studio.places import open_places
from studio_worker.local_studio.rules import QueuedJob
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.sqlite import SqliteFile
from studio_worker.local_studio.storage.tables import METADATA, files, jobs, meta, results
from tests.fakes.machine import PICTURE, Machine, queue

if TYPE_CHECKING:
    from tests.local_studio.on_postgres import OnPostgres


def nothing() -> None:
    pass


def carried(source: Path, there: Places) -> list[str]:
    """Carry the studio of a file; returns what was told."""
    told: list[str] = []
    carry_studio(source.parent, there, told.append)
    return told


@contextmanager
def opened(there: Places) -> Iterator[Database]:
    database, _ = open_places(there, nothing)
    with closing(database):
        yield database


@pytest.fixture
def there(tmp_path: Path, on_postgres: OnPostgres | None) -> Places:
    """A new place: a SQLite file or, for `make test-farm`, a PostgreSQL database; and a folder."""
    folder = tmp_path / "there"
    file = folder / "studio.sqlite3"
    return Places(file if on_postgres is None else on_postgres.url(file), Folder(folder / "pictures"))


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


def test_everything_arrives_and_the_source_is_as_it_was(source: Path, there: Places) -> None:
    """Each row and picture of a studio of any form is in the new place, and the old one is as it was."""
    before = prints(source.parent)
    carried(source, there)
    assert prints(source.parent) == before
    with opened(there) as target:
        arrived = rows_of(target)
        with target.reading() as connection:
            keys = connection.execute(select(results.c.key)).scalars().all()
            keys += connection.execute(select(files.c.key)).scalars().all()
    contents = []
    for key in keys:
        with there.open_pictures().open(key).content as content:
            contents.append(content.read())
    assert contents == [PICTURE, b"\x89PNG\r\n\x1a\n"]
    with closing(SqliteFile(source, nothing, Folder(source.parent / "pictures"))) as was:
        assert arrived == rows_of(was)
    assert len(arrived["jobs"]) == 4


@pytest.mark.sqlite
def test_carried_studio_goes_on(tmp_path: Path, there: Places) -> None:
    """An approved worker needs no new approval; what waited is offered, and what was done is there."""
    with LocalStudio(tmp_path / "here" / "studio.sqlite3") as studio:
        machine = Machine(studio).connect()
        done, waiting = queue(studio), queue(studio)
        machine.take()
        assert machine.upload(done).status_code == 200
        machine.hang_up()
    carried(tmp_path / "here" / "studio.sqlite3", there)
    with LocalStudio(there) as studio:
        assert studio.result(done) == PICTURE
        machine.turn_to(studio).connect()
        assert machine.take()["jobId"] == waiting
        assert queue(studio) not in {done, waiting}
        machine.hang_up()


def test_target_with_anything_in_it_is_refused(source: Path, tmp_path: Path, there: Places) -> None:
    """What is in the new place already is neither mixed up nor lost."""
    carried(source, there)
    before = prints(tmp_path / "there" / "pictures")
    with pytest.raises(ConfigError, match=r"the database there is not empty: it has .*; name a new one"):
        carried(source, there)
    assert prints(tmp_path / "there" / "pictures") == before


@pytest.mark.sqlite
def test_studio_at_work_is_not_carried(tmp_path: Path, there: Places) -> None:
    """A studio that runs would go on writing to what is left behind."""
    with LocalStudio(tmp_path / "here" / "studio.sqlite3") as studio:
        with pytest.raises(ConfigError, match="--from: a studio is at work there; stop it first"):
            carried(tmp_path / "here" / "studio.sqlite3", there)
        queue(studio)


def test_folder_without_a_studio_is_a_clear_mistake(tmp_path: Path, there: Places) -> None:
    """A folder with no studio in it, or a file that is none, is named."""
    with pytest.raises(ConfigError, match="holds no studio that can be read"):
        carried(tmp_path / "nowhere" / "studio.sqlite3", there)
    (tmp_path / "studio.sqlite3").write_bytes(b"no database at all, and long enough to look like none" * 20)
    with pytest.raises(ConfigError, match="file is not a database"):
        carried(tmp_path / "studio.sqlite3", there)


class Filling(Folder):
    """A disk with room for one more picture."""

    room = 1

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        if self.room == 0:
            raise StorageFull("full")
        self.room -= 1
        return super().put(content, name, ext)


def test_storage_that_fills_up_leaves_nothing(older: Path, tmp_path: Path, there: Places) -> None:
    """Where pictures do not all go in, none stays, no row goes, and a second attempt succeeds."""
    with pytest.raises(StorageFull):
        carried(older, replace(there, pictures=Filling(tmp_path / "there" / "pictures")))
    assert prints(tmp_path / "there" / "pictures").keys() == {"studio"}
    carried(older, there)
    assert len(prints(tmp_path / "there" / "pictures").keys() - {"studio"}) == 2


def test_rows_that_come_later_have_numbers_of_their_own(older: Path, there: Places) -> None:
    """A job that is queued in the new place comes behind those that were carried."""
    carried(older, there)
    with opened(there) as target:
        queue_of(target).add(QueuedJob("new", "m", {}, {}, created_at=1.0))
        with target.reading() as connection:
            highest = connection.execute(select(func.max(jobs.c.seq))).scalar_one()
            number = select(jobs.c.seq).where(jobs.c.job_id == "new")
            assert connection.execute(number).scalar_one() == highest == 5


def queue_of(database: Database) -> JobQueue:
    return JobQueue(database, Folder(Path("nowhere")))


_KILLED = """
import os, signal, sys
from pathlib import Path
from studio_worker.local_studio import Places, carry_studio
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import Folder
folder, database, pictures, stage = sys.argv[1:]
def tell(text):
    if text.startswith(stage):
        os.kill(os.getpid(), signal.SIGKILL)
carry_studio(
    Path(folder), Places(database if "://" in database else Path(database), Folder(Path(pictures))), tell
)
"""


@pytest.mark.parametrize("stage", ["pictures: 2", "jobs: 4", "results: 1"])
def test_killed_attempt_leaves_an_empty_target(
    older: Path, tmp_path: Path, there: Places, stage: str
) -> None:
    """Killed at any point the new database is as empty as before, and the next attempt carries everything."""
    before = prints(older.parent)
    (tmp_path / "scratch").mkdir()
    given = (older.parent, there.database, tmp_path / "there" / "pictures", stage)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *map(str, given)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
    )
    assert done.returncode == -9, done.stderr
    assert before.items() <= prints(older.parent).items()
    with opened(there) as target:
        assert {name for name, rows in rows_of(target).items() if rows} == {meta.name}
    carried(older, there)
    with opened(there) as target:
        statuses = [row["status"] for row in rows_of(target)[jobs.name]]
    assert sorted(statuses) == ["done", "failed", "queued", "queued"]
