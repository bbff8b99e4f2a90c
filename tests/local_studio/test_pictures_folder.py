"""Whose a folder of pictures is, and what is said of one that cannot be used."""

from __future__ import annotations

import errno
import io
import shutil
from pathlib import Path

import pytest

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places, carry_studio, pictures_at
from studio_worker.local_studio.pictures import Folder, StorageFull
from tests.local_studio.test_results import png

pytestmark = pytest.mark.sqlite


def shared(folder: Path, name: str) -> Places:
    return Places(folder / name / "studio.sqlite3", pictures_at(str(folder / "shared")))


def pictures_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*-*"))


def test_folder_of_another_studio_is_refused(tmp_path: Path) -> None:
    """A studio that is started with another's pictures ends at once, with a cure, and removes nothing."""
    with LocalStudio(shared(tmp_path, "one")) as studio:
        kept = studio.add_picture(png())
    before = pictures_in(tmp_path / "shared")
    for _ in range(2):
        with pytest.raises(ConfigError, match="belong to another studio's database; choose another folder"):
            LocalStudio(shared(tmp_path, "two"))
    assert pictures_in(tmp_path / "shared") == before
    with LocalStudio(shared(tmp_path, "one")) as studio:
        assert studio.shelf.picture(kept.removeprefix("/files/")) is not None


def test_studio_of_before_keeps_the_folder_that_it_was_given(tmp_path: Path) -> None:
    """A folder without a mark is a database's that names a picture in it, and nobody else's afterwards."""
    with LocalStudio(shared(tmp_path, "one")) as studio:
        studio.add_picture(png())
    (tmp_path / "shared" / "studio").unlink()
    LocalStudio(shared(tmp_path, "one")).stop()
    with pytest.raises(ConfigError, match="another studio's database"):
        LocalStudio(shared(tmp_path, "two"))


def test_copy_of_database_and_folder_is_a_studio(tmp_path: Path) -> None:
    """The copy of a folder has its mark: with the database's copy it starts anywhere."""
    with LocalStudio(shared(tmp_path, "one")) as studio:
        studio.add_picture(png())
    shutil.copytree(tmp_path / "one", tmp_path / "copy" / "one")
    shutil.copytree(tmp_path / "shared", tmp_path / "copy" / "shared")
    LocalStudio(shared(tmp_path / "copy", "one")).stop()
    assert len(pictures_in(tmp_path / "copy" / "shared")) == 1


def test_nothing_is_removed_where_the_mark_is_gone(tmp_path: Path) -> None:
    """What lies under a share that is not mounted any more is nobody's: it stays."""
    folder = Folder(tmp_path)
    folder.claim("mine", None, is_first=True)
    (tmp_path / "job-0123456789abcdef.png").write_bytes(b"x")
    (tmp_path / "studio").unlink()
    assert folder.remove_unnamed((), 0.0) == 0
    (tmp_path / "studio").write_text("mine")
    assert folder.remove_unnamed((), 0.0) == 1


def test_studio_is_not_carried_into_its_own_folder(tmp_path: Path) -> None:
    """The old studio's folder stays its own; nothing is made in the new place."""
    LocalStudio(tmp_path / "old" / "studio.sqlite3").stop()
    there = Places(tmp_path / "new.sqlite3", pictures_at(str(tmp_path / "new" / ".." / "old" / "pictures")))
    with pytest.raises(ConfigError, match="--pictures: is the folder of the studio that is carried"):
        carry_studio(tmp_path / "old", there, print)
    assert not (tmp_path / "new.sqlite3").exists()


@pytest.mark.parametrize("place", ["", " "], ids=["empty", "blank"])
def test_place_without_a_name_is_refused(place: str) -> None:
    """An empty --pictures, of a variable that is not set, is not the folder one happens to be in."""
    with pytest.raises(ConfigError, match="--pictures: names no place"):
        pictures_at(place)


@pytest.mark.parametrize("place", ["file", "/proc/pictures"], ids=["file", "proc"])
def test_folder_that_cannot_be_written_ends_the_start(tmp_path: Path, place: str) -> None:
    """A place that can hold no picture is told at the start, with the cure, and not at the first picture."""
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="make it this user's, or choose another folder") as refused:
        LocalStudio(Places(tmp_path / "studio.sqlite3", pictures_at(str(tmp_path / place))))
    assert refused.value.exit_status == 78


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.ENOENT], ids=errno.errorcode.get)
def test_folder_that_is_spoilt_later_is_told_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Modes that somebody changes under a studio, or a folder taken away, cost no traceback: the worker keeps
    its picture, and comes again.
    """

    def refuse(_path: Path, _content: object) -> int:
        raise OSError(number, "refused")

    monkeypatch.setattr("studio_worker.local_studio.pictures.folder.store_atomic", refuse)
    with pytest.raises(StorageFull):
        Folder(tmp_path).put(io.BytesIO(b"x"), "job", "png")
