"""What is said of a folder with no studio that can be carried."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.storage.sqlite import SqliteFile
from tests.fakes.machine import queue
from tests.local_studio.test_carrying import carried, nothing


@pytest.mark.sqlite
def test_studio_at_work_is_not_carried(tmp_path: Path, there: Places) -> None:
    """A studio that runs would go on writing to what is left behind."""
    with LocalStudio(tmp_path / "here" / "studio.sqlite3") as studio:
        with pytest.raises(ConfigError, match="--from: a studio is at work there; stop it first"):
            carried(tmp_path / "here" / "studio.sqlite3", there)
        queue(studio)


def test_folder_without_a_studio_is_a_clear_mistake(tmp_path: Path, there: Places) -> None:
    """A folder with no studio in it, a file that is none, and one of another program are named as such: room
    would not help.
    """
    file = tmp_path / "studio.sqlite3"
    said = f"{tmp_path}: --from: holds no studio that can be read .*; name the folder"
    with pytest.raises(ConfigError, match=said):
        carried(file, there)
    file.write_bytes(b"no database at all, and long enough to look like none" * 20)
    with pytest.raises(ConfigError, match=said.replace(".*", ".*file is not a database.*")):
        carried(file, there)
    for content in ("", "CREATE TABLE cookies (name)"):
        file.unlink()
        with closing(sqlite3.connect(file)) as connection:
            connection.execute(content)
        with pytest.raises(ConfigError, match=said):
            carried(file, there)


@pytest.mark.parametrize(
    "mark", ["PRAGMA user_version = 99", "UPDATE alembic_version SET version_num = '99'"]
)
def test_studio_of_a_later_version_is_named(tmp_path: Path, there: Places, mark: str) -> None:
    """What this program cannot carry is told by the name that the operator gave, not by that of a copy."""
    SqliteFile(tmp_path / "studio.sqlite3", nothing, Folder(tmp_path / "pictures")).close()
    with closing(sqlite3.connect(tmp_path / "studio.sqlite3")) as connection:
        connection.execute(mark)
        connection.commit()
    with pytest.raises(ConfigError, match=f"^{tmp_path}: --from: was written by a later version"):
        carried(tmp_path / "studio.sqlite3", there)
