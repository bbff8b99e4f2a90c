"""Versions of the program beside one another: what a newer one leaves behind for one from before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.storage import migrating
from studio_worker.local_studio.storage.sqlite import SqliteFile
from tests.fakes.machine import PICTURE, Machine, queue
from tests.local_studio.test_carrying import carried, nothing

LATER = """
from alembic import op
from sqlalchemy import Column, Text

revision = "later"
down_revision = "{head}"
OLDEST_WRITER = "{oldest_writer}"


def upgrade():
    op.add_column("jobs", Column("mood", Text))
"""

LaterVersion = Callable[[str], AbstractContextManager[None]]


def head() -> str:
    newest = ScriptDirectory(str(migrating.MIGRATIONS)).get_current_head()
    assert newest is not None
    return newest


@pytest.fixture
def later_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaterVersion:
    """Within it the program is a version to come, with one revision more."""

    @contextmanager
    def running(oldest_writer: str) -> Iterator[None]:
        folder = tmp_path / "migrations"
        shutil.copytree(migrating.MIGRATIONS, folder, dirs_exist_ok=True)
        text = LATER.format(head=head(), oldest_writer=oldest_writer)
        (folder / "versions" / "revision_later.py").write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(migrating, "MIGRATIONS", folder)
            yield

    return running


def test_version_may_be_taken_back_where_the_newer_one_lets_it(
    tmp_path: Path, later_version: LaterVersion
) -> None:
    """What a newer version has only added to this one goes on with, and the newer one again after it."""
    path = tmp_path / "studio.sqlite3"
    with later_version(head()), LocalStudio(path) as studio:
        job_ids = [queue(studio)]
    for _ in range(2):  # nor does its own start shut it out
        with LocalStudio(path) as studio:
            job_ids.append(queue(studio))
            machine = Machine(studio).connect()
            job_id = machine.take()["jobId"]
            machine.beat(job_id)
            assert machine.upload(job_id).status_code == 200
            assert studio.result(job_id) == PICTURE
            machine.hang_up()
    with later_version(head()), LocalStudio(path) as studio:
        assert [studio.job(job_id).status for job_id in job_ids] == ["done", "done", "queued"]


def test_version_that_would_spoil_what_a_newer_one_wrote_is_refused(
    tmp_path: Path, later_version: LaterVersion
) -> None:
    """Where the newer version lets none go on from before it, this one leaves everything as it is."""
    path = tmp_path / "studio.sqlite3"
    with later_version("later"):
        LocalStudio(path).stop()
    with pytest.raises(ConfigError, match=r"later version of this program \(revision later\).*backup"):
        LocalStudio(path)
    with later_version("later"):
        LocalStudio(path).stop()


def test_version_that_shuts_out_those_at_work_waits_for_their_end(
    tmp_path: Path, later_version: LaterVersion
) -> None:
    """A newer version changes no table under a studio process that could not go on with it."""
    path = tmp_path / "studio.sqlite3"
    with LocalStudio(path) as at_work:
        with later_version("later"), pytest.raises(ConfigError, match=r"stop (it|them) first"):
            LocalStudio(path)
        queue(at_work)
    with later_version("later"):
        LocalStudio(path).stop()


def test_nothing_is_carried_to_the_database_of_a_newer_version(
    tmp_path: Path, later_version: LaterVersion, there: Places
) -> None:
    """Who copies all must know all: not even a database that this version may go on with is carried to."""
    here = tmp_path / "here"
    here.mkdir()
    SqliteFile(here / "studio.sqlite3", nothing, Folder(here / "pictures")).close()
    with later_version(head()):
        LocalStudio(there).stop()
    with pytest.raises(ConfigError, match=r"^--database: was written by a later version"):
        carried(here / "studio.sqlite3", there)


def test_every_revision_says_whom_it_lets_go_on() -> None:
    """No revision lets a program go on that the one before it has shut out, nor shuts out its own."""
    scripts = ScriptDirectory(str(migrating.MIGRATIONS)).walk_revisions()
    newest_first = [(script.revision, script.module.OLDEST_WRITER) for script in scripts]
    revisions = [revision for revision, _ in newest_first]
    oldest = [revisions.index(oldest_writer) for _, oldest_writer in newest_first]
    assert oldest == sorted(oldest)
    assert all(own <= let_in for own, let_in in enumerate(oldest))
