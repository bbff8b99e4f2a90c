"""The job in hand as a crash leaves it."""

from __future__ import annotations

import contextlib
import errno
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from studio_worker.spool.in_hand import JobInHand
from tests.lab.spooled import HOSTILE_IDS, job, names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def crashed_with(folder: Path, job_id: str) -> JobInHand:
    """A process that took ``job_id`` in hand and died, and the one after it."""
    JobInHand(folder).begin(job(job_id))
    return JobInHand(folder)


def test_job_in_hand_is_found_after_a_crash(folder: Path) -> None:
    """The job that a dead process had in hand is named once, by the next start."""
    in_hand = crashed_with(folder, "job-1")

    assert in_hand.recover() == ["job-1"]
    assert in_hand.recover() == []
    assert JobInHand(folder).recover() == []


def test_job_is_poisoned_after_two_crashes(folder: Path) -> None:
    """A job that was in hand at two crashes is not tried a third time, by no later process."""
    first = crashed_with(folder, "job-1")
    first.recover()
    assert not first.is_poisoned("job-1")

    second = crashed_with(folder, "job-1")
    second.recover()

    assert second.is_poisoned("job-1")
    assert JobInHand(folder).is_poisoned("job-1")
    assert not second.is_poisoned("job-2")


def test_processes_that_died_in_jobs_are_counted_in_a_row(folder: Path) -> None:
    """How many processes in a row died in the middle of a job outlives them, until one ends a job."""
    for number in range(1, 4):
        in_hand = crashed_with(folder, f"job-{number}")
        in_hand.recover()
        assert in_hand.crashes_in_a_row == number
        assert JobInHand(folder).crashes_in_a_row == number
    in_hand.begin(job())
    in_hand.end()
    assert in_hand.crashes_in_a_row == JobInHand(folder).crashes_in_a_row == 0


def test_job_that_ended_is_no_crash(folder: Path) -> None:
    """A process that dies after its job has ended blames nothing on it."""
    in_hand = JobInHand(folder)
    in_hand.begin(job())
    in_hand.end()
    in_hand.end()  # twice is as good as once

    assert JobInHand(folder).recover() == []


def test_job_that_ended_on_a_read_only_disk_is_no_crash(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note that the disk did not let go is removed once it does, before another job is taken; the note of
    a job begun since then stays.
    """
    in_hand = JobInHand(folder)

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for is_begun in (False, True):
        in_hand.begin(job("job-1"))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", read_only)
            in_hand.end()
        if is_begun:
            in_hand.begin(job("job-2"))
        assert in_hand.problem() is None
        assert JobInHand(folder).recover() == (["job-2"] if is_begun else [])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"job_id": 5}', b"\0\0\0", b"\xff\xfe"])
def test_job_in_hand_survives_a_corrupt_note(folder: Path, content: bytes) -> None:
    """A damaged note stops no start, and is gone afterwards."""
    crashed_with(folder, "job-1")
    (folder / "job-in-hand.json").write_bytes(content)

    in_hand = JobInHand(folder)

    assert in_hand.recover() == []
    assert not (folder / "job-in-hand.json").exists()
    in_hand.begin(job("job-2"))
    assert JobInHand(folder).recover() == ["job-2"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"job-1": "many"}', b'{"job-1": [3, null]}', b"\0\0\0"])
def test_job_in_hand_survives_corrupt_counts(folder: Path, content: bytes) -> None:
    """Damaged counts stop no start; counting begins anew."""
    in_hand = crashed_with(folder, "job-1")
    (folder / "crashes.json").write_bytes(content)

    in_hand = JobInHand(folder)

    assert not in_hand.is_poisoned("job-1")
    assert in_hand.recover() == ["job-1"]
    assert not in_hand.is_poisoned("job-1")
    assert list(json.loads((folder / "crashes.json").read_text())) == ["job-1"]


def test_job_in_hand_remembers_the_latest_crashes(folder: Path) -> None:
    """The list of crashes stays short, and what crashed last stays on it."""
    counts: dict[str, Any] = {f"old-{number}": ["note"] for number in range(200)}
    folder.mkdir()
    (folder / "crashes.json").write_text(json.dumps(counts))
    crashed_with(folder, "old-0").recover()
    crashed_with(folder, "new").recover()

    kept = json.loads((folder / "crashes.json").read_text())

    assert len(kept) == 200
    assert list(kept)[-2:] == ["old-0", "new"]
    assert JobInHand(folder).is_poisoned("old-0")


def test_job_in_hand_is_for_the_service_alone(folder: Path) -> None:
    """The spool can be read by nobody else, and holds no prompt."""
    JobInHand(folder).begin(job(prompt="a secret wish"))

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (note,) = folder.iterdir()
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert "wish" not in note.read_text()


@pytest.mark.parametrize("job_id", HOSTILE_IDS)
def test_job_in_hand_keeps_any_job_id(folder: Path, job_id: str) -> None:
    """Whatever the studio calls a job, the note stays in the folder and gives the name back."""
    in_hand = crashed_with(folder, job_id)

    assert in_hand.recover() == [job_id]
    assert names(folder.parent) == {"outbox"}


def test_crash_is_counted_once_where_the_next_start_dies_too(folder: Path) -> None:
    """A process killed while it counts the last one's crash makes no second crash of it."""
    JobInHand(folder).begin(job("job-1"))
    note = (folder / "job-in-hand.json").read_bytes()
    JobInHand(folder).recover()
    (folder / "job-in-hand.json").write_bytes(note)  # as if it had been killed before the note was gone

    in_hand = JobInHand(folder)

    assert in_hand.recover() == ["job-1"]
    assert not in_hand.is_poisoned("job-1")


def test_crash_on_a_full_disk_stops_no_start(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that takes no note keeps the service neither from starting nor from knowing the crash."""
    in_hand = crashed_with(small_disk / "spool", "job-1")
    fill(small_disk)

    with pytest.raises(OSError, match="No space left"):
        in_hand.begin(job("job-2"))
    assert in_hand.recover() == ["job-1"]
    assert [record.message for record in caplog.records] == ["crash cannot be noted"]


def fill(disk: Path) -> None:
    """Until nothing more has room."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


# --- several lanes ---


def test_job_that_only_waited_is_not_to_blame_for_a_crash(folder: Path) -> None:
    """Of two jobs in hand when a process died, the one at the device is counted; it is one crash in a row."""
    for _ in range(2):
        dying = JobInHand(folder)
        dying.begin(job("waits"), lane=1)
        dying.begin(job("kills"), lane=2)
        dying.at_device(lane=2)
        after = JobInHand(folder)
        assert after.recover() == ["kills"]
    assert after.is_poisoned("kills")
    assert not after.is_poisoned("waits")
    assert after.crashes_in_a_row == 2


def test_jobs_that_all_waited_share_the_blame(folder: Path) -> None:
    """A process that died while no job was at the device: each is counted, as the one of a single lane is."""
    dying = JobInHand(folder)
    for lane in (1, 2, 3):
        dying.begin(job(f"job-{lane}"), lane)
    assert JobInHand(folder).recover() == ["job-1", "job-2", "job-3"]


def test_note_of_each_lane_ends_by_itself(folder: Path) -> None:
    """A job that has ended is not found; what a lane that does not run any more had in hand is."""
    dying = JobInHand(folder)
    first, third = dying.of_lane(1), dying.of_lane(3)
    for lane, job_id in ((first, "job-1"), (third, "job-3")):
        lane.begin(job(job_id))
        lane.at_device()
    first.end()
    assert JobInHand(folder).recover() == ["job-3"]
    assert not list(folder.glob("job-in-hand*"))


def test_mark_of_an_earlier_job_blames_no_later_one(folder: Path) -> None:
    """What one job did at the device says nothing of the next one in that lane."""
    dying = JobInHand(folder)
    dying.begin(job("job-1"))
    dying.at_device()
    dying.begin(job("job-2"))
    dying.begin(job("kills"), lane=2)
    dying.at_device(lane=2)
    assert JobInHand(folder).recover() == ["kills"]
