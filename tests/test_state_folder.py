"""The state folder when its disk goes read-only, at the start and while the service runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_worker import config
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import StateUnavailable
from studio_worker.files import write_problem
from studio_worker.local_studio import LocalStudio
from tests.lab.service import DONE_S, READY_S, await_online, await_status, override, queue_synthetic

pytestmark = pytest.mark.welcoming_studio


class ReadOnly:
    """Folders that a read-only file system lies over."""

    def __init__(self) -> None:
        self._folders: list[Path] = []

    def over(self, folder: Path) -> None:
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=100m", "tmpfs", str(folder)]
        done = subprocess.run(mount, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        self._folders.append(folder)

    def mend(self) -> None:
        while self._folders:
            subprocess.run(["umount", "--lazy", str(self._folders.pop())], check=True)


@pytest.fixture
def read_only() -> Iterator[ReadOnly]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    mounts = ReadOnly()
    yield mounts
    mounts.mend()


@pytest.mark.parametrize("folder", ["outbox", "spool"])
def test_jobs_wait_while_the_state_folder_is_read_only(
    site: Path, studio: LocalStudio, tmp_path: Path, read_only: ReadOnly, folder: str
) -> None:
    """A disk that goes read-only while the service runs costs no job a try; mended, it gets them done."""
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        await_online(studio)
        read_only.over(tmp_path / "work" / "state" / folder)
        job_id = queue_synthetic(studio)
        refusal = await_refusal(running)
        assert refusal["code"] == "busy"
        assert "takes nothing: Read-only file system" in refusal["reason"]
        read_only.mend()
        await_status(studio, job_id, "done")
        assert studio.job(job_id).attempts == 1
        assert running.stop() == 0
    assert not [line for line in running.log_lines() if line["message"] == "job failed"]


def await_refusal(running: ServiceProcess) -> dict[str, str]:
    deadline = time.monotonic() + DONE_S
    while not (found := [line for line in running.log_lines() if line["message"] == "job rejected"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


def test_start_with_a_read_only_state_folder_is_tried_again(
    site: Path, tmp_path: Path, read_only: ReadOnly
) -> None:
    """A state folder that nothing can be written to ends the start with 75: systemd goes on trying."""
    (tmp_path / "work" / "state").mkdir(exist_ok=True)
    read_only.over(tmp_path / "work" / "state")
    with ServiceProcess(site, tmp_path / "log") as running:
        assert running.wait(READY_S) == 75
    (line,) = running.log_lines()
    assert "state.dir: folder" in line["error"]
    assert "read-only" in line["error"]


def test_link_to_a_disk_that_is_not_mounted_is_named(site: Path, tmp_path: Path) -> None:
    """A models folder that is a link to nowhere is told as what it is; the disk may come, so that is waited
    for, and nothing is made in its place.
    """
    (tmp_path / "models").symlink_to("/nonexistent/disk/models")
    for root in ("models", "models/below"):
        override(site, f'[models]\nroot = "{tmp_path}/{root}"\n')
        with pytest.raises(StateUnavailable, match="is a link to /nonexistent/disk/models") as caught:
            config.check_folders(config.load(site).settings)
        assert (caught.value.key, caught.value.exit_status) == ("models.root", 75)
        assert "mount the disk" in caught.value.cure


def test_writing_that_is_tried_leaves_nothing(tmp_path: Path) -> None:
    """Whether a folder takes files is tried out without a trace."""
    assert write_problem(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert write_problem(tmp_path / "none") == "No such file or directory"
