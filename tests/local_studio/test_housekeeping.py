"""What a studio keeps, and for how long; what is never removed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from studio_worker.local_studio import LocalStudio, Retention
from studio_worker.local_studio.rules import JobStatus
from tests.fakes.machine import WAIT_S, Machine, queue


@pytest.mark.sqlite
def test_old_jobs_go_where_the_operator_says_so(older: Path) -> None:
    """--keep-days removes finished and failed jobs, inputs and log lines that are older; queued jobs stay."""
    data = ["--data", str(older.parent)]
    command = [sys.executable, "-m", "studio_worker", "local-studio", *data, "--port", "0"]
    with subprocess.Popen([*command, "--keep-days", "30"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address is not None
        with requests.get(f"{address[0]}/api/events", stream=True, timeout=WAIT_S * 6) as events:
            for _ in events.iter_lines(chunk_size=1):
                state = requests.get(f"{address[0]}/api/state", timeout=WAIT_S).json()
                logs = requests.get(f"{address[0]}/api/logs", timeout=WAIT_S).json()["lines"]
                if state["queue"]["done"] + state["queue"]["failed"] == 0 and not logs:
                    break
        process.terminate()
    assert process.returncode == 0
    assert state["queue"]["queued"] == 2
    assert list((older.parent / "pictures").glob("*-*")) == []


@pytest.mark.sqlite
def test_nothing_goes_unasked(older: Path) -> None:
    """Without a limit everything is kept, however old."""
    with LocalStudio(older) as studio:
        studio.housekeeping.tidy()
        assert studio.queue.counts() == {"queued": 2, "offered": 0, "running": 0, "done": 1, "failed": 1}
        assert len(studio.logs()) == 1


@pytest.mark.sqlite
def test_inputs_stay_while_a_job_names_them(older: Path) -> None:
    """An old input picture of a job that still waits is not taken from under it."""
    with LocalStudio(older) as studio:
        queue(studio, task={"initImageUrl": "/files/input"})
    with LocalStudio(older, retention=Retention(keep_s=0)) as studio:
        studio.wait_for(lambda: studio.queue.counts()["done"] == 0, WAIT_S)
        studio.housekeeping.tidy()
        assert studio.shelf.picture("input") is not None


def test_oldest_pictures_go_where_there_are_too_many(tmp_path: Path) -> None:
    """Beyond the size that is kept the oldest go, with their files; new ones and failed jobs stay."""
    with LocalStudio(tmp_path / "studio.sqlite3", retention=Retention(keep_bytes=2500)) as studio:
        machine = Machine(studio).connect()
        made = [queue(studio) for _ in range(3)]
        job_id = machine.offered()["jobId"]
        for following in (*made[1:], None):
            assert machine.upload(job_id, b"x" * 1000).status_code == 200
            if following is not None:
                job_id = machine.hear()["claim"]["jobId"]
        studio.housekeeping.tidy()
        assert [job.job_id for job in studio.jobs(JobStatus.DONE)] == made[:0:-1]
        assert len(list((tmp_path / "pictures").glob("*-*"))) == 2
        machine.hang_up()
