"""`studio-worker submit`, as scripts use it: one line a job, and an exit status for all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.local_studio import Door, LocalStudio
from studio_worker.local_studio.rules import JobStatus
from tests.fakes.machine import PICTURE, SOURCE, Machine
from tests.fakes.scripted import ScriptedHttp

TOKEN = "a token of sufficient length"


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    with LocalStudio(tmp_path / "data" / "studio.sqlite3") as running:
        running.register_model("m", SOURCE)
        yield running


def begin(address: str, *args: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "studio_worker",
            "submit",
            "a red potion",
            "--studio",
            address,
            *map(str, args),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def submit(address: str, *args: str | Path) -> tuple[int, list[str], str]:
    """Exit status, lines, and what was complained of."""
    with begin(address, *args) as process:
        out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out.splitlines(), err


def test_submit_queues_and_names_each_job(studio: LocalStudio) -> None:
    """Without --wait each job is queued and named on a line, as it was asked for."""
    status, lines, err = submit(
        studio.base_url, "--model", "m", "--count", "3", "--seed", "7", "--size", "64x32",
        "--priority", "5", "--submitter", "pia",
    )  # fmt: skip
    assert (status, err) == (0, "")
    jobs = studio.jobs(JobStatus.QUEUED)
    assert lines == [f"{job.job_id} queued" for job in jobs]
    assert [job.task["seed"] for job in jobs] == [7, 8, 9]
    for job in jobs:
        assert (job.model, job.priority, job.submitter) == ("m", 5, "pia")
        assert (job.task["prompt"], job.task["width"], job.task["height"]) == ("a red potion", 64, 32)
        assert "steps" not in job.task, "what is not given is the model's own"


def test_submit_waits_and_brings_the_pictures(studio: LocalStudio, tmp_path: Path) -> None:
    """With -o the pictures lie in the folder; a failed job tells its reason, and the status is 1."""
    folder = tmp_path / "new" / "pictures"
    machine = Machine(studio).connect()
    with begin(studio.base_url, "-m", "m", "-n", "2", "-o", folder) as process:
        studio.wait_for(lambda: studio.queue.counts()["queued"] == 2, 30)
        made = machine.take()["jobId"]
        assert machine.upload(made, ext="png").status_code == 200
        failing = machine.hear()["claim"]["jobId"]
        machine.say("fail", jobId=failing, error="no such\nengine", retryable=False)
        machine.hear()
        out, err = process.communicate(timeout=60)
    machine.hang_up()
    assert (process.returncode, err) == (1, "")
    assert out.splitlines() == [f"{made} done {folder / made}.png", f"{failing} failed no such engine"]
    assert (folder / f"{made}.png").read_bytes() == PICTURE
    assert [path.name for path in folder.iterdir()] == [f"{made}.png"]


def test_submit_says_what_is_left_when_the_time_is_up(studio: LocalStudio) -> None:
    """When --timeout is over, what is not made is named with what it waits for; the status says: for now."""
    status, lines, err = submit(studio.base_url, "-m", "m", "--wait", "--timeout", "0.1")
    (job,) = studio.jobs(JobStatus.QUEUED)
    assert (status, lines, err) == (75, [f"{job.job_id} queued no worker is connected"], "")


def test_submit_outlives_a_restart_of_the_studio(tmp_path: Path) -> None:
    """A studio that is restarted while its jobs are waited for is asked again when it is back."""
    database = tmp_path / "studio.sqlite3"
    with LocalStudio(database) as studio:
        machine, door = Machine(studio), Door(port=studio.port)
        process = begin(studio.base_url, "-m", "placeholder", "--wait")
        studio.wait_for(lambda: studio.queue.counts()["queued"] == 1, 30)
    with LocalStudio(database, door=door) as studio:
        machine.studio = studio
        job_id = machine.connect().take()["jobId"]
        assert machine.upload(job_id).status_code == 200
        out, err = process.communicate(timeout=60)
        machine.hang_up()
    assert (process.returncode, out, err) == (0, f"{job_id} done\n", "")


def test_submit_gives_the_token(tmp_path: Path) -> None:
    """A studio with a token is told it from a file that nobody else can read; without it the status is 77."""
    secret = tmp_path / "token"
    secret.write_text(TOKEN + "\n")
    secret.chmod(0o600)
    with LocalStudio(tmp_path / "studio.sqlite3", door=Door(token=TOKEN)) as studio:
        status, lines, err = submit(studio.base_url, "-m", "placeholder")
        assert (status, lines) == (77, [])
        assert "--token-file" in err
        status, lines, err = submit(studio.base_url, "-m", "placeholder", "--token-file", secret)
        assert (status, len(lines), err) == (0, 1, "")


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["-m", "unknown"], 1, "'unknown' is not registered"),
        (["-m", "m", "--format", "../x"], 1, "task.ext"),
        (["-m", "m", "--size", "wide"], 2, "write e.g. 1024x768"),
        (["-m", "m", "--studio", "nowhere"], 78, "no address of a studio"),
        (["-m", "m", "--studio", "http://127.0.0.1:9"], 75, "cannot be reached"),
        (["-m", "m", "-o", "/proc/pictures"], 74, "/proc/pictures"),
        (["-m", "m", "--token-file", "/nonexistent"], 78, "name another --token-file"),
    ],
    ids=["model", "format", "size", "address", "away", "folder", "token"],
)
def test_submit_mistakes_are_told(studio: LocalStudio, args: list[str], status: int, said: str) -> None:
    """A mistake is told in a sentence, with an exit status of its own, before anything is queued."""
    found, lines, err = submit(studio.base_url, *args)
    assert (found, lines) == (status, [])
    assert said in err
    assert studio.jobs() == []


@pytest.mark.parametrize(
    "answers",
    [
        [{"jobId": "../evil"}],
        [{"jobId": "j"}, *[{"jobId": "j", "status": "done", "result": {"ext": "/../../evil"}}] * 20],
        [["no object"]],
    ],
    ids=["id", "extension", "shape"],
)
def test_submit_trusts_no_name_that_a_stranger_answers(tmp_path: Path, answers: list[Any]) -> None:
    """What answers in a studio's place cannot choose where a file is written, and is told as no studio."""
    folder = tmp_path / "in" / "pictures"
    with ScriptedHttp(*((200, {}, answer) for answer in answers)) as stranger:
        process = begin(stranger.url, "-m", "m", "-o", folder, "--timeout", "0.1")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
