"""Whose a folder of pictures is, and what is said of one that cannot be used."""

from __future__ import annotations

import errno
import io
import shutil
from pathlib import Path

import pytest
import requests

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places, carry_studio, pictures_at
from studio_worker.local_studio.pictures import Folder, RangeRefused, StorageFull
from tests.fakes.machine import PICTURE, Machine, queue
from tests.local_studio.test_results import png

WAIT_S = 10.0
CONTENT = bytes(range(256)) * 40

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


@pytest.mark.parametrize("is_empty", [True, False], ids=["empty", "none"])
def test_share_that_is_not_mounted_any_more_costs_no_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_empty: bool
) -> None:
    """What is delivered meanwhile does not vanish below the share: the worker keeps it and comes again. What
    lies on the share is not said to be gone.
    """
    share, mounted = tmp_path / "shared", tmp_path / "mounted"
    with LocalStudio(shared(tmp_path, "one")) as studio:
        machine, done, job_id = Machine(studio).connect(), queue(studio), queue(studio)
        machine.take()
        assert machine.upload(done).status_code == 200
        machine.say("accept", jobId=machine.hear()["claim"]["jobId"])
        share.rename(mounted)
        if is_empty:
            share.mkdir()
        result = f"{studio.base_url}/api/jobs/{done}/result"
        assert machine.upload(job_id).status_code == 503
        assert requests.post(f"{studio.base_url}/api/files", data=png(), timeout=WAIT_S).status_code == 503
        assert requests.get(result, timeout=WAIT_S).status_code == 503
        assert [record.exc_info for record in caplog.records if record.levelname == "ERROR"] == [None] * 3
        assert share.is_dir() == is_empty
        assert studio.job(job_id).status == "running"
        if is_empty:
            share.rmdir()
        mounted.rename(share)
        assert machine.upload(job_id).status_code == 200
        assert requests.get(result, timeout=WAIT_S).content == studio.result(job_id) == PICTURE
        machine.hang_up()


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=8-11", 8, 11),
        ("bytes=10000-", 10000, 10239),
        ("bytes=10000-20000", 10000, 10239),
        ("bytes=-5", 10235, 10239),
        ("bytes=-20000", 0, 10239),
    ],
)
def test_files_are_read_in_parts(tmp_path: Path, asked: str, first: int, last: int) -> None:
    """A range gets its bytes alone, as from S3; one that begins behind the end is refused."""
    folder = Folder(tmp_path)
    key = folder.put(io.BytesIO(CONTENT), "job", "png").key
    reading = folder.open(key, asked)
    with reading.content as content:
        assert content.read() == CONTENT[first : last + 1]
    assert (reading.size_bytes, reading.content_range) == (last + 1 - first, f"bytes {first}-{last}/10240")
    for behind in ("bytes=10240-", "bytes=-0"):
        with pytest.raises(RangeRefused):
            folder.open(key, behind)


@pytest.mark.parametrize(
    "asked",
    [None, "bytes=0-1,4-5", "lines=1-2", "bytes=", "bytes=5", "bytes=5-4", f"bytes={'9' * 5000}-"],
    ids=["none", "several", "lines", "empty", "open", "backwards", "longer than any file"],
)
def test_ranges_of_other_forms_get_the_whole_file(tmp_path: Path, asked: str | None) -> None:
    """Whoever asks for more than one range, or for something else, gets everything, which HTTP allows."""
    folder = Folder(tmp_path)
    reading = folder.open(folder.put(io.BytesIO(CONTENT), "job", "png").key, asked)
    with reading.content as content:
        assert (content.read(), reading.size_bytes, reading.content_range) == (CONTENT, len(CONTENT), None)
