"""Pictures in a folder that all processes of a studio have."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import update

from studio_worker.errors import ConfigError
from studio_worker.local_studio import Places, pictures_at
from studio_worker.local_studio.housekeeping import DAY_S, Housekeeping, Retention
from studio_worker.local_studio.storage.tables import jobs
from studio_worker.local_studio.studio import Studio


def test_what_a_crash_left_in_a_shared_folder_goes_after_a_day(database_url: str, tmp_path: Path) -> None:
    """A file that another process may be about to name stays; what nobody named for a day goes, but for
    what is a person's own.
    """
    left, fresh, notes = (
        tmp_path / name for name in ("job-0123456789abcdef.png", "job-fedcba9876543210.png", "notes.txt")
    )
    places = Places(database_url, pictures_at(str(tmp_path)))
    Studio(places).database.close()
    for file in (left, fresh, notes):
        file.write_bytes(b"x")
    for file in (left, notes):
        os.utime(file, times=(time.time() - DAY_S - 60,) * 2)
    for _ in range(2):
        studio = Studio(places)
        studio.housekeeping.keep_house()
        studio.database.close()
        assert (left.exists(), fresh.exists(), notes.exists()) == (False, True, True)


@contextmanager
def opened(database: Path | str, folder: Path) -> Iterator[Studio]:
    studio = Studio(Places(database, pictures_at(str(folder))))
    try:
        yield studio
    finally:
        studio.database.close()


def test_second_process_with_another_folder_is_refused(database_url: str, tmp_path: Path) -> None:
    """All processes of a database have one folder: who would look in another is told before it takes work."""
    another = Places(database_url, pictures_at(str(tmp_path / "two")))
    with (
        opened(database_url, tmp_path / "one"),
        opened(database_url, tmp_path / "one"),
        pytest.raises(ConfigError, match="this database's pictures are in another place"),
    ):
        Studio(another)
    assert not list((tmp_path / "two").iterdir())


def test_new_database_takes_no_folder_of_an_older_studio(database_url: str, tmp_path: Path) -> None:
    """Pictures of a studio of before, which has marked nothing, are refused, and lie there as before."""
    (tmp_path / "job-0123456789abcdef.png").write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(ConfigError, match="has pictures that this database does not know"):
            Studio(Places(database_url, pictures_at(str(tmp_path))))
    assert [path.name for path in tmp_path.iterdir()] == ["job-0123456789abcdef.png"]


def test_wrong_clock_of_one_process_removes_nothing(database_url: str, tmp_path: Path) -> None:
    """What ended, or came, just now is not old, whatever the clock of the process that tidies up says."""
    with opened(database_url, tmp_path) as studio:
        job_id = studio.queue_job(model="placeholder", task={"prompt": "x"})
        with studio.database.writing() as connection:
            connection.execute(update(jobs).values(status="failed", finished_at=time.time()))
        fresh = tmp_path / "job-0123456789abcdef.png"
        fresh.write_bytes(b"x")
        housekeeping = Housekeeping(
            studio.database,
            studio.queue,
            studio.shelf,
            studio.pictures,
            Retention(keep_s=DAY_S),
            clock=lambda: time.time() + 2 * DAY_S,
        )
        housekeeping.keep_house()
        assert studio.job(job_id).status == "failed"
        assert fresh.exists()
