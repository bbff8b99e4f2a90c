"""A studio carried to another database: what arrives, what is refused, what a killed attempt leaves."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from sqlalchemy import func, select

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.local_studio import LocalStudio, Places, carry_studio
from studio_worker.local_studio.carrying import Carrier
from studio_worker.local_studio.job_queue import JobQueue
from studio_worker.local_studio.pictures import Folder, StorageFull, StoredBytes
from studio_worker.local_studio.places import OWNER, open_places
from studio_worker.local_studio.rules import QueuedJob
from studio_worker.local_studio.shelf import Model
from studio_worker.local_studio.stopped import stopped_studio
from studio_worker.local_studio.storage.database import Database
from studio_worker.local_studio.storage.sqlite import SqliteFile
from studio_worker.local_studio.storage.tables import METADATA, files, jobs, meta, results
from tests.fakes.machine import PICTURE, Machine, queue


def nothing(*_said: object) -> None:
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


def rows_of(database: Database) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, but for what pictures are called, and marked with."""
    with database.reading() as connection:
        found = {
            table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for table in METADATA.sorted_tables
        }
    for name in (results.name, files.name):
        for row in found[name]:
            del row["key"]
    found[meta.name] = [row for row in found[meta.name] if row["key"] != OWNER]
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


def test_target_where_a_studio_was_only_started_counts_as_empty(
    before_revisions: Path, there: Places
) -> None:
    """A first start, to see that database and storage can be used, costs nothing: its placeholder is not
    mixed in. What was carried is more than that.
    """
    LocalStudio(there).stop()
    carried(before_revisions, there)
    with LocalStudio(there) as studio:
        assert studio.result("done") == PICTURE
        assert [model.model_id for model in studio.models()] == ["placeholder"]
    with pytest.raises(ConfigError, match="it has"):
        carried(before_revisions, there)


def test_target_with_a_model_of_somebody_is_not_empty(before_revisions: Path, there: Places) -> None:
    """One model that was added there is somebody's work."""
    with LocalStudio(there) as studio:
        studio.shelf.put_model(Model("mine", "Mine", {"engine": "synthetic", "files": []}, 1.0))
    with pytest.raises(ConfigError, match="not empty: it has models"):
        carried(before_revisions, there)


def test_target_where_a_studio_is_at_work_is_refused(before_revisions: Path, there: Places) -> None:
    """A studio that runs there would go on with what it read before."""
    with LocalStudio(there), pytest.raises(ConfigError, match="stop it first"):
        carried(before_revisions, there)
    carried(before_revisions, there)


def test_pictures_that_lie_elsewhere_are_asked_for(
    before_revisions: Path, tmp_path: Path, there: Places
) -> None:
    """A studio is not carried without its pictures because they lay in another place than beside its file."""
    (tmp_path / "pictures").rename(tmp_path / "moved")
    with pytest.raises(
        ConfigError, match="holds none of the studio's pictures; with --pictures name the place"
    ):
        carried(before_revisions, there)
    (tmp_path / "moved").rename(tmp_path / "pictures")
    carried(before_revisions, there)
    assert len(prints(tmp_path / "there" / "pictures")) == 3


@pytest.mark.sqlite
def test_pictures_of_somebody_else_stay(before_revisions: Path, tmp_path: Path, there: Places) -> None:
    """Pictures that lie where the new ones would go are no leavings: beside a new file they are told of, and
    beside one with which a studio was started there they stay.
    """
    picture = tmp_path / "there" / "pictures" / "job-0123456789abcdef.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(PICTURE)
    beside = replace(there, pictures=None)
    with pytest.raises(ConfigError, match="has pictures that this database does not know"):
        carried(before_revisions, beside)
    os.utime(picture, (time.time() - 3600,) * 2)
    LocalStudio(beside).stop()
    for stage in ("jobs", "nothing"):
        with contextlib.suppress(KeyboardInterrupt):
            carry_studio(tmp_path, beside, interrupting(stage))
    assert picture.read_bytes() == PICTURE
    assert len(prints(picture.parent)) == 4


def interrupting(stage: str) -> Callable[[str], None]:
    def tell(text: str) -> None:
        if text.startswith(stage):
            raise KeyboardInterrupt

    return tell


def test_second_place_beside_the_first_is_refused(
    before_revisions: Path, tmp_path: Path, there: Places
) -> None:
    """A database that was started with one folder is not carried to with another: its processes would look in
    either.
    """
    LocalStudio(there).stop()
    with pytest.raises(ConfigError, match="this database's pictures are in another place"):
        carried(before_revisions, replace(there, pictures=Folder(tmp_path / "second")))
    assert not list((tmp_path / "second").iterdir())


def test_picture_that_cannot_be_read_is_named(before_revisions: Path, tmp_path: Path, there: Places) -> None:
    """A studio is not carried without a picture that is there, but cannot be read now."""
    picture = tmp_path / "pictures" / "done-5d0776fa846e7ebc.webp"
    picture.unlink()
    picture.mkdir()
    with pytest.raises(StateUnavailable, match=f"^{picture}: --from: .* cannot be read"):
        carried(before_revisions, there)
    assert prints(tmp_path / "there" / "pictures").keys() == {"studio"}


class Filling(Folder):
    """A disk with room for one more picture."""

    room = 1

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        if self.room == 0:
            raise StorageFull("full")
        self.room -= 1
        return super().put(content, name, ext)


def test_storage_that_fills_up_leaves_nothing(older: Path, tmp_path: Path, there: Places) -> None:
    """Where pictures do not all go in, none stays, no row goes, the place is named with the cure, and a
    second attempt succeeds, elsewhere too.
    """
    folder = tmp_path / "there" / "pictures"
    with pytest.raises(StateUnavailable) as told:
        carried(older, replace(there, pictures=Filling(folder)))
    assert told.value.exit_status == 75
    assert str(told.value).startswith(f"{folder}: --pictures: ")
    assert "make room there, and begin again: nothing was carried" in str(told.value)
    assert prints(folder).keys() == {"studio"}
    carried(older, replace(there, pictures=Folder(tmp_path / "elsewhere")))
    assert len(prints(tmp_path / "elsewhere").keys() - {"studio"}) == 2


@pytest.mark.sqlite
def test_database_that_fills_up_is_named(before_revisions: Path, tmp_path: Path, there: Places) -> None:
    """Where the rows do not go in the file is named with the cure, and no picture stays."""
    with closing(sqlite3.connect(before_revisions)) as source_file:
        source_file.execute("UPDATE jobs SET reason = hex(randomblob(100000))")
        source_file.commit()
    target, _ = open_places(there, nothing)
    with target.reading() as connection:
        (pages,) = connection.exec_driver_sql("PRAGMA page_count").one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with closing(target), stopped_studio(tmp_path) as source, pytest.raises(StateUnavailable) as told:
        Carrier(source, target, there, nothing).carry()
    assert str(told.value).startswith(f"{there.database}: --database: the studio's disk takes no more data")
    assert "make room there, and begin again: nothing was carried" in str(told.value)
    assert prints(tmp_path / "there" / "pictures").keys() == {"studio"}


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


_ENDED = """
import os, signal, sys
from studio_worker.cli import local_studio, main
stage, number = sys.argv[1], int(sys.argv[2])
def tell(text):
    if text.startswith(stage):
        os.kill(os.getpid(), number)
local_studio.say = tell
for each in (signal.SIGINT, signal.SIGHUP):  # as in a terminal, whatever these tests run in the background of
    signal.signal(each, signal.SIG_DFL)
sys.argv[1:] = ["local-studio", "carry", *sys.argv[3:]]
main()
"""


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (signal.SIGKILL, "pictures: 2"),
        (signal.SIGKILL, "jobs: 4"),
        (signal.SIGKILL, "results: 1"),
        (signal.SIGTERM, "pictures: 2"),
        (signal.SIGTERM, "jobs: 4"),
        (signal.SIGINT, "pictures: 2"),
        (signal.SIGHUP, "jobs: 4"),
    ],
    ids=[
        "kill-pictures",
        "kill-jobs",
        "kill-results",
        "term-pictures",
        "term-jobs",
        "int-pictures",
        "hup-jobs",
    ],
)
def test_attempt_that_is_ended_leaves_an_empty_target(
    older: Path,
    tmp_path: Path,
    there: Places,
    stage: str,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ended at any point the new database is as empty as before, and the next attempt carries everything;
    after a signal that can be heard nothing is left at all, and what kill -9 leaves that attempt removes.
    """
    before = prints(older.parent)
    scratch, folder = tmp_path / "scratch", tmp_path / "there" / "pictures"
    scratch.mkdir()
    options = ("--from", older.parent, "--database", there.database, "--pictures", folder)
    done = subprocess.run(
        [sys.executable, "-c", _ENDED, stage, str(int(number)), *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    is_heard = number is not signal.SIGKILL
    assert done.returncode == (128 + number if is_heard else -number), done.stderr
    assert (list(scratch.iterdir()) == []) == is_heard
    assert len(prints(folder).keys() - {"studio"}) == (0 if is_heard else 2)
    assert before.items() <= prints(older.parent).items()
    with opened(there) as target:
        assert {name for name, rows in rows_of(target).items() if rows} == {meta.name}
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    carried(older, there)
    assert list(scratch.iterdir()) == []
    assert len(prints(folder).keys() - {"studio"}) == 2
    with opened(there) as target:
        statuses = [row["status"] for row in rows_of(target)[jobs.name]]
    assert sorted(statuses) == ["done", "failed", "queued", "queued"]


def test_attempt_that_another_has_overtaken_carries_nothing(
    before_revisions: Path, tmp_path: Path, there: Places
) -> None:
    """Of two attempts at one database the later one has it, and its pictures: the earlier one ends."""
    shutil.copytree(tmp_path / "pictures", tmp_path / "copy" / "pictures")
    shutil.copy(before_revisions, tmp_path / "copy" / before_revisions.name)
    target, _ = open_places(there, nothing)

    def overtake(text: str) -> None:
        if text == "pictures: 2 of 2":
            with stopped_studio(tmp_path / "copy") as copy:
                Carrier(copy, target, there, lambda _text: None).carry()

    with closing(target), stopped_studio(tmp_path) as source, pytest.raises(ConfigError, match="another"):
        Carrier(source, target, there, overtake).carry()
    with LocalStudio(there) as studio:
        assert studio.result("done") == PICTURE
