"""A studio's backup, taken while it works as docs/farm.md says, and restored in a new place."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from studio_worker.local_studio import LocalStudio
from studio_worker.local_studio.rules import JobStatus
from tests.fakes.machine import PICTURE, Machine, queue

pytestmark = pytest.mark.sqlite


def back_up(source: Path, target: Path) -> None:
    """What docs/farm.md does: the database first, and then pictures, which never change."""
    target.mkdir()
    with closing(sqlite3.connect(source / "studio.sqlite3")) as live:
        live.execute("VACUUM INTO ?", (str(target / "studio.sqlite3"),))
    shutil.copytree(source / "pictures", target / "pictures")


def test_backup_of_a_studio_at_work_is_a_studio(tmp_path: Path) -> None:
    """Jobs, pictures and approved workers are in a backup that was taken while jobs came in; from it another
    studio goes on, in another folder.
    """
    with LocalStudio(tmp_path / "here" / "studio.sqlite3") as studio:
        machine = Machine(studio).connect()
        made = []
        for number in range(3):
            made.append(queue(studio))
            machine.take()
            assert machine.upload(made[-1], PICTURE + bytes([number])).status_code == 200
        machine.beat(job_id="something else")
        waiting = [queue(studio) for _ in range(50)]
        stop, begun = threading.Event(), threading.Event()

        def go_on() -> None:
            while not stop.is_set():
                queue(studio)
                begun.set()

        people = threading.Thread(target=go_on)
        people.start()
        begun.wait()
        back_up(tmp_path / "here", tmp_path / "backup")
        stop.set()
        people.join()
        assert machine.socket is not None
        machine.socket.close()
    shutil.move(tmp_path / "here", tmp_path / "lost")
    shutil.copytree(tmp_path / "backup", tmp_path / "there")
    with LocalStudio(tmp_path / "there" / "studio.sqlite3") as studio:
        assert [studio.result(job_id) for job_id in made] == [
            PICTURE + bytes([number]) for number in range(3)
        ]
        assert {job.job_id for job in studio.jobs(JobStatus.QUEUED, 10_000)} > set(waiting)
        machine.turn_to(studio).connect()
        claim = machine.take()
        assert machine.upload(claim["jobId"]).status_code == 200
        machine.hang_up()
