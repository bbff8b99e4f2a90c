"""Whose pictures are after a studio was carried: each studio has a mark of its own."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places, carry_studio
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.places import claim_pictures
from studio_worker.local_studio.storage.sqlite import SqliteFile
from tests.fakes.machine import PICTURE
from tests.local_studio.test_carrying import carried, nothing


@pytest.mark.sqlite
def test_each_studio_keeps_to_its_own_pictures(tmp_path: Path, there: Places) -> None:
    """After it was carried the old studio is not started with the new one's pictures, nor the new one with
    the old one's: either would remove what it does not know. Each starts with its own.
    """
    old = tmp_path / "here" / "studio.sqlite3"
    LocalStudio(old).stop()
    carried(old, there)
    for places in (
        Places(old, Folder(tmp_path / "there" / "pictures")),
        Places(there.database, Folder(tmp_path / "here" / "pictures")),
    ):
        with pytest.raises(ConfigError, match="belong to another studio's database"):
            LocalStudio(places)
    for places in (Places(old), there):
        LocalStudio(places).stop()


@pytest.fixture
def staying(tmp_path: Path, before_revisions: Path) -> Folder:
    """The folder of a studio's pictures where it is not beside its file."""
    folder = tmp_path / "share"
    (tmp_path / "pictures").rename(folder)
    with closing(SqliteFile(before_revisions, nothing, Folder(folder))) as source:
        claim_pictures(source, Folder(folder))
    return Folder(folder)


def refused_here(file: Path, pictures: Folder) -> str:
    """What the old studio says at its start."""
    with closing(SqliteFile(file, nothing, pictures)) as source, pytest.raises(ConfigError) as told:
        claim_pictures(source, pictures)
    return str(told.value)


def test_pictures_that_stay_are_the_new_studios(
    before_revisions: Path, there: Places, staying: Folder
) -> None:
    """Where the new studio is given the folder that the old one has, no picture is copied; the old one ends
    at its start, and is not carried once more, with what has become of it.
    """
    before = {path.name: path.read_bytes() for path in staying.path.iterdir()}
    there = replace(there, pictures=staying)
    assert any("they stay where they are" in line for line in carried(before_revisions, there))
    after = {path.name: path.read_bytes() for path in staying.path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"studio"}
    for _ in range(2):
        said = refused_here(before_revisions, staying)
        assert "this studio was carried to another database" in said
        assert "start the studio with the --database that it was carried to" in said
        with LocalStudio(there) as studio:
            assert studio.result("done") == PICTURE
    second = Places(before_revisions.parent / "second.sqlite3", staying)
    with pytest.raises(ConfigError, match="this studio was carried to another database"):
        carried(before_revisions, second)


def test_pictures_that_an_older_copy_lacks_are_added(
    before_revisions: Path, there: Places, staying: Folder
) -> None:
    """Where the place is a copy of the data folder that lacks what came since, that goes there too."""
    shutil.copytree(staying.path, before_revisions.parent / "pictures")
    (staying.path / "done-5d0776fa846e7ebc.webp").unlink()
    there = replace(there, pictures=staying)
    carried(before_revisions, there)
    with LocalStudio(there) as studio:
        assert studio.result("done") == PICTURE
    assert len(list(staying.path.iterdir())) == 3


class Dying(Folder):
    """Whoever would mark it again is killed."""

    def claim(self, owner: str, newest_key: str | None, *, is_first: bool) -> None:
        raise KeyboardInterrupt


def test_pictures_that_stay_are_taken_by_the_new_studios_start(
    before_revisions: Path, there: Places, staying: Folder
) -> None:
    """Killed between the last row and the mark, the new studio marks the folder as its own when it starts."""
    with pytest.raises(KeyboardInterrupt):
        carried(before_revisions, replace(there, pictures=Dying(staying.path)))
    with LocalStudio(replace(there, pictures=staying)) as studio:
        assert studio.result("done") == PICTURE
    assert "this studio was carried to another database" in refused_here(before_revisions, staying)


def test_pictures_that_stay_are_not_taken_before_the_rows_are_there(
    before_revisions: Path, there: Places, staying: Folder
) -> None:
    """Killed before the last row, the old studio goes on with its folder."""

    def end(text: str) -> None:
        if text.startswith("results"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_studio(before_revisions.parent, replace(there, pictures=staying), end)
    with closing(SqliteFile(before_revisions, nothing, staying)) as source:
        claim_pictures(source, staying)
    assert len(list(staying.path.iterdir())) == 3
    carried(before_revisions, replace(there, pictures=staying))
