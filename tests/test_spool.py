"""What survives a crash: every finished picture, and the count of what the job in hand did."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

import pytest

from studio_worker.jobs import ImageTask, Job, Picture
from studio_worker.models import ModelSource
from studio_worker.spool import JobInHand, Outbox

HOSTILE_IDS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "",
    "a/b",
    "nul\0nul",
    "\n",
    "x" * 10_000,
    "\ud800",
    "…",
]

ADDER = """
import sys
from pathlib import Path
from studio_worker.jobs import ImageTask, Job, Picture
from studio_worker.models import ModelSource
from studio_worker.spool import Outbox
outbox = Outbox(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    job = Job(str(number), "model", ImageTask(prompt="p" * number), ModelSource(engine="sdcpp"))
    outbox.add(job, Picture(bytes([number % 256]) * 50_000, "webp", {"number": number}), {})
    print(number, flush=True)
    number += 1
"""


def job(job_id: str = "job-1", prompt: str = "a lighthouse") -> Job:
    return Job(job_id, "sample", ImageTask(prompt=prompt), ModelSource(engine="sdcpp"))


def picture(content: bytes = b"picture") -> Picture:
    return Picture(content, "webp", {"seed": 7})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def note_of(folder: Path) -> Path:
    (note,) = folder.glob("*.json")
    return note


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


# --- the outbox ---


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
def test_outbox_leaves_nothing_of_a_picture_the_disk_does_not_take(
    folder: Path, picture_bytes: int, prompt_bytes: int
) -> None:
    """A picture that could not be kept whole is an error and leaves no bytes behind."""
    outbox = Outbox(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            outbox.add(job(prompt="p" * prompt_bytes), picture(b"x" * picture_bytes), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert names(folder) == set()


def test_outbox_leaves_nothing_of_a_picture_it_cannot_describe(folder: Path) -> None:
    """Facts that do not fit into a note are an error before anything is written."""
    with pytest.raises(TypeError):
        Outbox(folder).add(job(), Picture(b"x", "webp", {"seed": object()}), {})

    assert names(folder) == set()


def test_outbox_wakes_whoever_waits(folder: Path) -> None:
    """A call to look again is heard, also one that came before the waiting began, and once."""
    outbox = Outbox(folder)
    outbox.wake()
    outbox.wait(None)

    woken = threading.Thread(target=outbox.wait, args=(None,))
    woken.start()
    woken.join(0.05)
    assert woken.is_alive()
    outbox.wake()
    woken.join(10)

    assert not woken.is_alive()


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


# --- the job in hand ---


def crashed_with(folder: Path, job_id: str) -> JobInHand:
    """A process that took ``job_id`` in hand and died, and the one after it."""
    JobInHand(folder).begin(job(job_id))
    return JobInHand(folder)


def test_job_in_hand_is_found_after_a_crash(folder: Path) -> None:
    """The job that a dead process had in hand is named once, by the next start."""
    in_hand = crashed_with(folder, "job-1")

    assert in_hand.recover() == "job-1"
    assert in_hand.recover() is None
    assert JobInHand(folder).recover() is None


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


def test_job_that_ended_is_no_crash(folder: Path) -> None:
    """A process that dies after its job has ended blames nothing on it."""
    in_hand = JobInHand(folder)
    in_hand.begin(job())
    in_hand.end()
    in_hand.end()  # twice is as good as once

    assert JobInHand(folder).recover() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"job_id": 5}', b"\0\0\0", b"\xff\xfe"])
def test_job_in_hand_survives_a_corrupt_note(folder: Path, content: bytes) -> None:
    """A damaged note stops no start, and is gone afterwards."""
    crashed_with(folder, "job-1")
    (folder / "job-in-hand.json").write_bytes(content)

    in_hand = JobInHand(folder)

    assert in_hand.recover() is None
    assert not (folder / "job-in-hand.json").exists()
    in_hand.begin(job("job-2"))
    assert JobInHand(folder).recover() == "job-2"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"job-1": "many"}', b'{"job-1": null}', b"\0\0\0"])
def test_job_in_hand_survives_corrupt_counts(folder: Path, content: bytes) -> None:
    """Damaged counts stop no start; counting begins anew."""
    in_hand = crashed_with(folder, "job-1")
    (folder / "crashes.json").write_bytes(content)

    in_hand = JobInHand(folder)

    assert not in_hand.is_poisoned("job-1")
    assert in_hand.recover() == "job-1"
    assert json.loads((folder / "crashes.json").read_text()) == {"job-1": 1}


def test_job_in_hand_remembers_the_latest_crashes(folder: Path) -> None:
    """The list of crashes stays short, and what crashed last stays on it."""
    counts: dict[str, Any] = {f"old-{number}": 1 for number in range(200)}
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

    assert in_hand.recover() == job_id
    assert names(folder.parent) == {"outbox"}
