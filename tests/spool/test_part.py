"""One outbox, and the lanes that deliver from it: every picture is one lane's, and none is left behind."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from studio_worker.jobs import Picture
from studio_worker.spool import picture_files
from studio_worker.spool.outbox import Outbox
from studio_worker.spool.part import OutboxPart
from tests.lab.spooled import job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def two_lanes(outbox: Outbox) -> tuple[OutboxPart, OutboxPart]:
    outbox.lanes.update({1, 2})
    return OutboxPart(outbox, 1), OutboxPart(outbox, 2)


def waiting(part: OutboxPart) -> list[str]:
    return [delivery.job_id for delivery in part.oldest()]


def add(part: OutboxPart, job_id: str, content: bytes = b"picture") -> None:
    part.add(job(job_id), Picture(content, "webp", {"seed": 7}), {})


def test_picture_is_delivered_by_the_lane_that_made_it(folder: Path) -> None:
    """Each lane sees its own pictures, also after a restart; what an earlier version kept is the first's."""
    first, second = two_lanes(Outbox(folder))
    add(first, "job-1")
    add(second, "job-2")
    assert (waiting(first), waiting(second)) == (["job-1"], ["job-2"])
    first, second = two_lanes(Outbox(folder))
    assert (waiting(first), waiting(second)) == (["job-1"], ["job-2"])
    for note in folder.glob("*.json"):
        note.write_text(note.read_text().replace(', "lane": 1', "").replace(', "lane": 2', ""))
    assert sorted(waiting(first)) == ["job-1", "job-2"]


@pytest.mark.parametrize("is_full", [False, True])
def test_picture_goes_to_the_lane_that_is_offered_its_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """Taken over by another lane it is that one's alone, on a full disk too; the lane that had it can no
    more remove it.
    """
    first, second = two_lanes(Outbox(folder))
    add(second, "job-1")
    (had,) = second.oldest()

    def full(*given: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if is_full:
            patch.setattr(picture_files, "write_atomic", full)
        first.take_over("job-1")
    second.remove(had)
    assert (waiting(first), waiting(second)) == (["job-1"], [])
    assert first.oldest()[0].read() == b"picture"
    first.remove(first.oldest()[0])
    assert not first.holds("job-1")


def test_picture_of_a_lane_that_does_not_run_waits_for_another(folder: Path) -> None:
    """With fewer lanes than before a picture is not lost: it counts, it can be taken over, and it expires."""
    now = [0.0]
    _, second = two_lanes(Outbox(folder, clock=lambda: now[0]))
    add(second, "job-1")
    add(second, "job-2")
    outbox = Outbox(folder, max_age_s=10.0, clock=lambda: now[0])
    only = OutboxPart(outbox, 1)
    assert waiting(only) == []
    assert outbox.usage().count == 2
    only.take_over("job-2")
    assert waiting(only) == ["job-2"]
    now[0] = 11.0
    assert sorted(delivery.job_id for delivery, _ in only.expire()) == ["job-1", "job-2"]


def test_lane_drops_and_reports_its_own_pictures_alone(folder: Path) -> None:
    """Where pictures expire, each lane hears of those that its own session has to report."""
    now = [0.0]
    first, second = two_lanes(Outbox(folder, max_age_s=10.0, clock=lambda: now[0]))
    add(first, "job-1")
    add(second, "job-2")
    now[0] = 11.0
    assert [delivery.job_id for delivery, _ in first.expire()] == ["job-1"]
    assert [delivery.job_id for delivery, _ in second.expire()] == ["job-2"]


def test_part_wakes_whoever_waits(folder: Path) -> None:
    """A call to look again is heard, also one that came before the waiting began, and once."""
    outbox = OutboxPart(Outbox(folder), 1)
    outbox.wake()
    outbox.wait(None)

    woken = threading.Thread(target=outbox.wait, args=(None,))
    woken.start()
    woken.join(0.05)
    assert woken.is_alive()
    outbox.wake()
    woken.join(10)

    assert not woken.is_alive()
