"""Who has the kept bytes of a download."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from studio_worker.download import download_file
from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer
from tests.lab.downloads import (
    BIG,
    await_bytes,
    await_line,
    files_in,
    kill,
    staged,
    start_child,
)


def test_two_processes_share_one_download(server: FileServer, tmp_path: Path) -> None:
    """Of two processes that want one file, one fetches it and the other waits for it."""
    file = server.serve("/model.bin", BIG, hold_after=500_000)
    dest = tmp_path / "model.bin"
    first = start_child(file, dest, sha256=file.sha256)
    await_bytes(first, 500_000)
    second = start_child(file, dest, sha256=file.sha256)
    await_line(second, lambda line: line == "500000")  # the waiting one sees how far the other is
    file.release()

    await_line(first, lambda line: line == "done")
    await_line(second, lambda line: line == "done")
    assert (first.wait(), second.wait()) == (0, 0)
    for child in (first, second):
        assert child.stdout is not None
        child.stdout.close()

    assert dest.read_bytes() == BIG
    assert len(file.requests) == 1
    assert files_in(tmp_path) == {"model.bin"}


def test_a_killed_download_does_not_hold_up_the_next(server: FileServer, tmp_path: Path) -> None:
    """A process that waits for another takes over when that one is killed."""
    file = server.serve("/model.bin", BIG, hold_after=500_000)
    dest = tmp_path / "model.bin"
    child = start_child(file, dest, sha256=file.sha256)
    await_bytes(child, 500_000)
    waiting = threading.Event()

    def look(*_: int | None) -> None:
        waiting.set()

    thread = threading.Thread(
        target=download_file, args=(file.url, dest), kwargs={"sha256": file.sha256, "progress": look}
    )
    thread.start()
    assert waiting.wait(10)
    kill(child)
    file.release()
    thread.join(10)

    assert dest.read_bytes() == BIG
    assert [asked.range for asked in file.requests] == [None, "bytes=500000-"]


def test_process_that_hangs_with_a_download_is_not_waited_for_for_ever(
    server: FileServer, tmp_path: Path
) -> None:
    """Another process that has the file and brings nothing of it is given up after ten minutes; what it
    brings meanwhile begins them anew.
    """
    file = server.serve("/model.bin", BIG, hold_after=500_000)
    dest = tmp_path / "model.bin"
    child = start_child(file, dest, sha256=file.sha256)
    await_bytes(child, 500_000)
    (part,) = (tmp_path / ".staging").glob("*.part")
    waits: list[float] = []

    def wait(event: threading.Event, seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 2900:
            part.touch()  # as when a little more has come
        return event.is_set()

    with pytest.raises(DownloadError, match=r"another process has this download, .* nothing") as caught:
        download_file(file.url, dest, sha256=file.sha256, policy=Policy(wait=wait))

    assert sum(waits) == pytest.approx(2900 * 0.2 + 600, abs=1)
    assert not caught.value.is_final_here
    kill(child)


def test_download_can_be_cancelled_while_another_process_has_the_file(
    server: FileServer, tmp_path: Path
) -> None:
    """A stop does not wait for somebody else's download."""
    file = server.serve("/model.bin", BIG, hold_after=500_000)
    dest = tmp_path / "model.bin"
    child = start_child(file, dest, sha256=file.sha256)
    await_bytes(child, 500_000)
    cancel = threading.Event()

    with pytest.raises(DownloadCancelled):
        download_file(file.url, dest, sha256=file.sha256, cancel=cancel, progress=lambda *_: cancel.set())

    kill(child)
    assert len(file.requests) == 1
    assert staged(tmp_path).stat().st_size == 500_000
