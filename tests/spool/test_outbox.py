"""Finished pictures that wait for delivery: none is lost, none is half, none stays for ever."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_worker.jobs import Picture
from studio_worker.spool.outbox import Outbox
from tests.lab.spooled import HOSTILE_IDS, job, names

ADDER = """
import sys
from pathlib import Path
from studio_worker.jobs import ImageTask, Job, Picture
from studio_worker.models import ModelSource
from studio_worker.spool.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    job = Job(str(number), "model", ImageTask(prompt="p" * number), ModelSource(engine="sdcpp"))
    outbox.add(job, Picture(bytes([number % 256]) * 50_000, "webp", {"number": number}), {})
    print(number, flush=True)
    number += 1
"""


def picture(content: bytes = b"picture") -> Picture:
    return Picture(content, "webp", {"seed": 7})


def note_of(folder: Path) -> Path:
    (note,) = folder.glob("*.json")
    return note


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def test_outbox_keeps_a_picture_across_a_restart(folder: Path) -> None:
    """A finished picture, and all that its upload needs, is there after a restart."""
    before = time.time()
    Outbox(folder).add(job(), picture(), {"generate": 1.5})

    (delivery,) = Outbox(folder).oldest()

    assert delivery.data_path.read_bytes() == b"picture"
    assert (delivery.job_id, delivery.model, delivery.ext) == ("job-1", "sample", "webp")
    assert (delivery.prompt, delivery.meta) == ("a lighthouse", {"seed": 7})
    assert delivery.timings_s == {"generate": 1.5}
    assert before <= delivery.finished_at <= time.time()


def test_outbox_gives_the_oldest_first(folder: Path) -> None:
    """Pictures are delivered in the order in which they were finished."""
    outbox = Outbox(folder)
    ids = [f"job-{number}" for number in range(20)]
    for job_id in ids:
        outbox.add(job(job_id), picture(), {})

    assert [delivery.job_id for delivery in Outbox(folder).oldest()] == ids


def test_outbox_forgets_what_is_delivered(folder: Path) -> None:
    """A delivered picture leaves nothing behind; the others stay."""
    outbox = Outbox(folder)
    outbox.add(job("one"), picture(), {})
    outbox.add(job("two"), picture(), {})
    one, two = outbox.oldest()

    outbox.remove(one)
    assert (outbox.holds("one"), outbox.holds("two")) == (False, True)
    outbox.remove(two)
    outbox.remove(two)  # twice is as good as once

    assert names(folder) == set()


def test_outbox_takes_the_same_job_again(folder: Path) -> None:
    """A job that was made twice is delivered once, with its last picture."""
    outbox = Outbox(folder)
    outbox.add(job(), picture(b"first"), {})
    outbox.add(job(), picture(b"second"), {})

    (delivery,) = outbox.oldest()

    assert delivery.data_path.read_bytes() == b"second"


def test_outbox_is_for_the_service_alone(folder: Path) -> None:
    """Prompts and pictures can be read by nobody else, in a folder that was open before too."""
    folder.mkdir(mode=0o755)
    Outbox(folder).add(job(), picture(), {})

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("job_id", HOSTILE_IDS)
def test_outbox_lets_no_job_id_name_a_path(folder: Path, job_id: str) -> None:
    """Whatever the studio calls a job, its picture stays in the folder."""
    outbox = Outbox(folder)

    outbox.add(job(job_id), picture(), {})

    assert outbox.holds(job_id)
    assert len(names(folder)) == 2
    assert names(folder.parent) == {"outbox"}


def test_outbox_removes_bytes_without_a_note(folder: Path) -> None:
    """What a crash left half-way is cleared at the next start."""
    Outbox(folder).add(job(), picture(), {})
    (folder / "0123.data").write_bytes(b"half a picture")
    (folder / ".0123.json.abc.tmp").write_bytes(b"half a note")

    outbox = Outbox(folder)

    assert len(outbox.oldest()) == 1
    assert len(names(folder)) == 2


def test_outbox_sets_a_note_without_bytes_aside(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture whose bytes are gone holds up no other; it is logged and kept for a person to look at."""
    outbox = Outbox(folder)
    outbox.add(job("lost"), picture(), {})
    lost = note_of(folder)
    outbox.add(job("well"), picture(), {})
    lost.with_suffix(".data").unlink()

    assert [delivery.job_id for delivery in outbox.oldest()] == ["well"]
    assert [delivery.job_id for delivery in Outbox(folder).oldest()] == ["well"]

    assert names(folder / "unreadable") == {lost.name}
    assert caplog.messages == ["picture cannot be delivered and is set aside"]
    assert caplog.records[0].levelno == logging.ERROR


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\0\0\0\0",
        b"\xff\xfe",
        b'{"job_id": "job-1"}',
        b'{"job_id": "job-1", "model": "m", "ext": "webp", "prompt": "p", "meta": {}, "finished_at": "noon"}',
        b'{"job_id": "other", "model": "m", "ext": "webp", "prompt": "p", "meta": {}, "finished_at": 1}',
    ],
)
def test_outbox_sets_an_unreadable_note_aside_with_its_bytes(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """A damaged note stops nothing, and the picture it belongs to is not lost."""
    outbox = Outbox(folder)
    outbox.add(job(), picture(), {})
    note = note_of(folder)
    outbox.add(job("well"), picture(), {})
    note.write_bytes(content)

    again = Outbox(folder)
    assert [delivery.job_id for delivery in again.oldest()] == ["well"]
    again.oldest()
    Outbox(folder)

    aside = folder / "unreadable"
    assert (aside / note.with_suffix(".data").name).read_bytes() == b"picture"
    assert (aside / note.name).read_bytes() == content
    assert stat.S_IMODE(aside.stat().st_mode) == 0o700
    assert caplog.messages == ["picture cannot be delivered and is set aside"]


def test_outbox_reads_notes_of_other_versions(folder: Path) -> None:
    """After an upgrade or a downgrade pictures that wait are still delivered."""
    outbox = Outbox(folder)
    outbox.add(job(), picture(), {})
    note = json.loads(note_of(folder).read_text())
    del note["timings_s"]
    note_of(folder).write_text(json.dumps(note | {"colour": "blue"}))

    assert [delivery.timings_s for delivery in outbox.oldest()] == [{}]


@pytest.mark.parametrize(("picture_bytes", "prompt_bytes"), [(200_000, 10), (10, 200_000)])
def test_outbox_keeps_a_picture_the_disk_does_not_take_in_memory(
    folder: Path, picture_bytes: int, prompt_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk costs no finished picture: it waits in memory, and is written once there is room."""
    outbox = Outbox(folder)
    content = b"x" * picture_bytes
    with full_disk():
        outbox.add(job(prompt="p" * prompt_bytes), picture(content), {"generate": 1.0})
        assert names(folder) == set()
        outbox.catch_up()
        (delivery,) = outbox.oldest()
    assert (delivery.job_id, delivery.read(), delivery.timings_s) == ("job-1", content, {"generate": 1.0})
    assert outbox.holds("job-1")
    assert outbox.only_in_memory() == ["job-1"]
    assert outbox.usage().size_bytes == picture_bytes
    assert "does not take" in (outbox.fullness() or "")
    assert caplog.messages == ["picture cannot be written and waits in memory; make room on the disk"]

    outbox.catch_up()

    assert outbox.only_in_memory() == []
    assert outbox.fullness() is None
    (delivery,) = Outbox(folder).oldest()
    assert delivery.read() == content


def test_outbox_forgets_a_picture_in_memory_that_is_delivered(folder: Path) -> None:
    """A picture that went to the studio straight from memory is not kept any longer."""
    outbox = Outbox(folder)
    with full_disk():
        outbox.add(job(), picture(b"x" * 200_000), {})
        outbox.remove(outbox.oldest()[0])

    assert (outbox.oldest(), outbox.holds("job-1"), outbox.only_in_memory()) == ([], False, [])


def test_outbox_fills_memory_only_so_far(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What neither the disk nor the memory can take is an error, before the machine runs out of memory."""
    monkeypatch.setattr("studio_worker.spool.outbox._MEMORY_BYTES", 300_000)
    outbox = Outbox(folder)
    with full_disk():
        outbox.add(job("one"), picture(b"x" * 200_000), {})
        with pytest.raises(OSError, match="File too large"):
            outbox.add(job("two"), picture(b"x" * 200_000), {})

    assert [delivery.job_id for delivery in outbox.oldest()] == ["one"]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- limits ---


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 5000.0

    def __call__(self) -> float:
        return self.seconds


def test_outbox_beyond_its_size_drops_the_oldest_first(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond the limit no job is begun; what is too much goes, the oldest first, each with a line."""
    clock = Clock()
    outbox = Outbox(folder, max_bytes=250, reserve_bytes=0, clock=clock)
    for job_id in ("a", "b", "c"):
        clock.seconds += 1
        assert outbox.fullness() is None
        outbox.add(job(job_id), picture(b"x" * 100), {})
    assert "3 finished pictures wait" in (outbox.fullness() or "")

    dropped = outbox.expire()

    assert [(d.job_id, reason) for d, reason in dropped] == [
        ("a", "more pictures wait than [state] outbox_max_gb allows")
    ]
    assert [delivery.job_id for delivery in outbox.oldest()] == ["b", "c"]
    lines = [r.__dict__ for r in caplog.records if r.message == "picture dropped undelivered"]
    assert [(line["job_id"], line["model"]) for line in lines] == [("a", "sample")]
    assert outbox.expire() == []


def test_outbox_drops_what_is_too_old(folder: Path) -> None:
    """A picture that the studio has not taken for so many days of running is dropped, and no younger one."""
    clock = Clock()
    outbox = Outbox(folder, max_age_s=100.0, clock=clock)
    outbox.add(job("old"), picture(), {})
    clock.seconds += 60
    outbox.add(job("young"), picture(), {})
    clock.seconds += 60

    assert [d.job_id for d, _ in outbox.expire()] == ["old"]
    assert [d.job_id for d in outbox.oldest()] == ["young"]


def test_outbox_age_goes_on_over_restarts_and_stands_still_between_them(folder: Path) -> None:
    """Days count while a service runs, whatever the clock of the machine did meanwhile."""
    clock = Clock()
    outbox = Outbox(folder, max_age_s=3600.0, clock=clock)
    outbox.add(job(), picture(), {})
    clock.seconds += 2000
    assert outbox.expire() == []

    clock.seconds = 3.0  # the machine was off for a month; its clock begins anew
    outbox = Outbox(folder, max_age_s=3600.0, clock=clock)
    assert outbox.expire() == []
    clock.seconds += 2000

    assert [reason for _, reason in outbox.expire()] == ["it waited 0.0 days ([state] outbox_max_days)"]


@pytest.mark.parametrize("wall", [0.0, 4e9])
def test_outbox_is_not_misled_by_the_wall_clock(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wall: float
) -> None:
    """A box that starts in 1970, or jumps into the next century, drops no picture and keeps their order."""
    outbox = Outbox(folder, max_age_s=86_400.0)
    outbox.add(job("first"), picture(), {})
    monkeypatch.setattr(time, "time", lambda: wall)
    outbox.add(job("second"), picture(), {})

    again = Outbox(folder, max_age_s=86_400.0)

    assert again.expire() == []
    assert [delivery.job_id for delivery in again.oldest()] == ["first", "second"]


@pytest.mark.parametrize("content", [b"", b"noon", b"nan", b"-5", b"inf", b"\xff"])
def test_outbox_survives_a_damaged_age(folder: Path, content: bytes) -> None:
    """Without its age file the outbox still knows that no picture is younger than its note says."""
    clock = Clock()
    outbox = Outbox(folder, max_age_s=100.0, clock=clock)
    clock.seconds += 50
    outbox.add(job(), picture(), {})
    (folder / "age").write_bytes(content)

    clock.seconds = 0.0
    again = Outbox(folder, max_age_s=100.0, clock=clock)

    assert again.expire() == []
    clock.seconds += 101
    assert len(again.expire()) == 1


def test_outbox_without_room_on_its_disk_says_so(small_disk: Path) -> None:
    """Before the disk is full no further job is begun."""
    assert Outbox(small_disk / "outbox", reserve_bytes=1_000_000).fullness() is None
    assert Outbox(small_disk / "outbox", reserve_bytes=8_000_000).fullness() == (
        "the disk for finished pictures is full"
    )


def test_outbox_has_room_for_the_jobs_of_all_lanes(small_disk: Path) -> None:
    """Where the disk has room for one lane's picture, and not for all lanes', none takes a job."""
    outbox = Outbox(small_disk / "outbox", reserve_bytes=1_000_000)
    assert outbox.fullness() is None
    outbox.lanes.update(range(1, 9))
    assert outbox.fullness() == "the disk for finished pictures is full"


def test_outbox_loses_nothing_to_jobs_that_were_in_hand_when_it_filled_up(folder: Path) -> None:
    """Lanes that all had a job when the limit was reached keep their pictures, and no older one goes."""
    outbox = Outbox(folder, max_bytes=100, reserve_bytes=100)
    outbox.lanes.update({1, 2, 3})
    ids = ["before", "one", "two", "three"]
    outbox.add(job("before"), picture(b"x" * 90), {})
    assert outbox.fullness() is None
    for lane, job_id in enumerate(ids[1:], 1):
        outbox.add(job(job_id), picture(b"x" * 90), {}, lane)
    assert "4 finished pictures wait" in (outbox.fullness() or "")
    assert [outbox.expire(lane) for lane in (1, 2, 3)] == [[], [], []]
    assert [delivery.job_id for delivery in outbox.oldest()] == ids


def test_outbox_that_cannot_remove_delivers_nothing_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A delivered picture on a disk that went read-only is not sent again and again."""
    outbox = Outbox(folder)
    outbox.add(job(), picture(), {})
    (delivery,) = outbox.oldest()

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        outbox.remove(delivery)

    assert (outbox.oldest(), outbox.holds("job-1")) == ([], False)
    assert caplog.records[0].__dict__["error"] == "Read-only file system"
    outbox.add(job(), picture(b"another"), {})
    assert outbox.holds("job-1")


def test_outbox_removes_what_is_delivered_once_the_disk_lets_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is mended is rid of what was delivered meanwhile, at once and not at the next start; a
    picture that came for the same job since then stays.
    """
    outbox = Outbox(folder)
    for job_id in ("job-1", "job-2"):
        outbox.add(job(job_id), picture(), {})

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        for delivery in outbox.oldest():
            outbox.remove(delivery)
        outbox.catch_up()
        assert not outbox.is_caught_up()
    outbox.add(job("job-2"), picture(b"another"), {})

    outbox.catch_up()

    assert outbox.is_caught_up()
    (left,) = Outbox(folder).oldest()
    assert (left.job_id, left.read()) == ("job-2", b"another")
    assert len(list(folder.glob("*.data"))) == 1


def test_outbox_leaves_nothing_of_a_picture_it_cannot_describe(folder: Path) -> None:
    """Facts that do not fit into a note are an error before anything is written."""
    with pytest.raises(TypeError):
        Outbox(folder).add(job(), Picture(b"x", "webp", {"seed": object()}), {})

    assert names(folder) == set()


@pytest.mark.parametrize("seed", range(8))
def test_outbox_holds_whole_pictures_or_none_after_a_kill(folder: Path, seed: int) -> None:
    """A process killed at any moment leaves every finished picture whole, and no half one."""
    child = subprocess.Popen([sys.executable, "-c", ADDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    threading.Event().wait(random.Random(seed).uniform(0.0, 0.15))
    child.send_signal(signal.SIGKILL)
    told = [int(line) for line in child.communicate()[0].splitlines() if line.strip().isdecimal()]

    waiting = Outbox(folder).oldest()

    numbers = [int(delivery.job_id) for delivery in waiting]
    assert numbers == list(range(len(numbers)))
    assert len(told) <= len(numbers) <= len(told) + 1
    for number, delivery in enumerate(waiting):
        assert delivery.data_path.read_bytes() == bytes([number % 256]) * 50_000
        assert (delivery.prompt, delivery.meta) == ("p" * number, {"number": number})
    assert len(names(folder)) == 2 * len(numbers)
