"""`studio-worker submit`, as scripts use it: one line a job, and an exit status for all of them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from studio_worker.cli import app
from studio_worker.cli import submit as submit_command
from studio_worker.engine.pictures.encoding import check_ext
from studio_worker.errors import ConfigError, JobImpossible
from studio_worker.local_studio import Door, LocalStudio
from studio_worker.local_studio.rules import JobStatus
from tests.fakes.machine import PICTURE, SOURCE, Machine
from tests.fakes.scripted import ScriptedHttp

NOWHERE = "http://127.0.0.1:9"
"""Nothing listens there (RFC 863's port)."""
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
    machine.beat(job_id="something else")
    with begin(studio.base_url, "-m", "m", "-n", "2", "-o", folder) as process:
        studio.wait_for(lambda: studio.queue.counts()["queued"] == 2, 30)
        made = machine.take()["jobId"]
        assert machine.upload(made, ext="png").status_code == 200
        failing = machine.hear()["claim"]["jobId"]
        machine.say("fail", jobId=failing, error="no such\nengine", retryable=False)
        machine.hear()
        out, err = process.communicate(timeout=60)
    machine.hang_up()
    assert (process.returncode, err) == (1, f"{made} queued\n{failing} queued\n")
    assert out.splitlines() == [f"{made} done {folder / made}.png", f"{failing} failed no such engine"]
    assert (folder / f"{made}.png").read_bytes() == PICTURE
    assert [path.name for path in folder.iterdir()] == [f"{made}.png"]


def test_submit_says_what_is_left_when_the_time_is_up(studio: LocalStudio) -> None:
    """When --timeout is over, what is not made is named with what it waits for; the status says: for now."""
    status, lines, err = submit(studio.base_url, "-m", "m", "--wait", "--timeout", "0.1")
    (job,) = studio.jobs(JobStatus.QUEUED)
    assert (status, lines) == (75, [f"{job.job_id} queued no worker is connected"])
    assert err == f"{job.job_id} queued\n"


def test_submit_that_is_stopped_has_named_what_is_queued(studio: LocalStudio) -> None:
    """What is waited for is named when queued, and at SIGTERM the lines say which jobs are still there."""
    with begin(studio.base_url, "-m", "m", "-n", "2", "--wait") as process:
        assert process.stderr is not None
        named = [process.stderr.readline() for _ in range(2)]
        process.terminate()
        out, _ = process.communicate(timeout=60)
    job_ids = [job.job_id for job in studio.jobs(JobStatus.QUEUED)]
    assert named == [f"{job_id} queued\n" for job_id in job_ids]
    assert [line.split()[:2] for line in out.splitlines()] == [[job_id, "queued"] for job_id in job_ids]
    assert process.returncode == 128 + signal.SIGTERM


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
    assert (process.returncode, out) == (0, f"{job_id} done\n")
    assert err.count("\n") <= 2, "the job, and that it was away is told once, where it was noticed at all"


def test_submit_tells_that_the_studio_is_away(tmp_path: Path) -> None:
    """A studio that goes while its jobs are waited for is named at the time, once, and again at the end."""
    with LocalStudio(tmp_path / "studio.sqlite3") as studio:
        address = studio.base_url
        process = begin(address, "-m", "placeholder", "-n", "3", "--wait", "--timeout", "4")
        studio.wait_for(lambda: studio.queue.counts()["queued"] == 3, 30)
        job_ids = [job.job_id for job in studio.jobs(JobStatus.QUEUED)]
    assert process.stderr is not None
    assert {process.stderr.readline() for _ in job_ids} == {f"{job_id} queued\n" for job_id in job_ids}
    at_the_time = process.stderr.readline()
    assert process.poll() is None, "told while there is still time"
    out, at_the_end = process.communicate(timeout=60)
    assert process.returncode == 75
    assert [line.split()[:2] for line in out.splitlines()] == [[job_id, "queued"] for job_id in job_ids]
    for said in (at_the_time, at_the_end):
        assert re.fullmatch(
            rf"studio-worker: the studio at {address} cannot be reached since \d\d:\d\d:\d\d: .+\n", said
        )


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
        (
            ["-m", "m", "--studio", "http://127.0.0.1:9"],
            75,
            "the studio at http://127.0.0.1:9 cannot be reached",
        ),
        (["-m", "m", "-n", "4", "--wait", "--studio", NOWHERE], 75, "or name another with --studio"),
        (
            ["-m", "m", "-o", "/proc/pictures"],
            74,
            "/proc/pictures: No such file or directory; name another -o",
        ),
        (["-m", "m", "-o", __file__], 74, "test_submit.py: File exists; name another -o"),
        (["-m", "m", "-o", "/proc"], 74, "/proc: No such file or directory; name another -o"),
        (["-m", "m", "--token-file", "/nonexistent"], 78, "name another --token-file"),
    ],
    ids=["model", "away", "away-cure", "folder", "folder-file", "folder-full", "token"],
)
def test_submit_mistakes_are_told(studio: LocalStudio, args: list[str], status: int, said: str) -> None:
    """A mistake is told in a sentence, with an exit status of its own, before anything is queued."""
    found, lines, err = submit(studio.base_url, *args)
    assert (found, lines) == (status, [])
    assert said in err
    assert studio.jobs() == []


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--format", "gif", "'gif' is none of"),
        ("--format", "../x", "is none of"),
        ("--sampler", "magic", "'magic' is none of"),
        ("--size", "wide", "write e.g. 1024x768"),
        ("--size", "0x64", "16 to 4096"),
        ("--size", "64x4097", "16 to 4096"),
        ("--size", "4096x4096", "8388608 pixels"),
        ("--count", "0", "greater than or equal to 1"),
        ("--priority", "101", "less than or equal to 100"),
        ("--seed", "-1", "greater than or equal to 0"),
        ("--seed", str(2**64), "less than or equal to 18446744073709551615"),
        ("--steps", "151", "less than or equal to 150"),
        ("--cfg", "51", "less than or equal to 50"),
        ("--cfg", "nan", "less than or equal to 50"),
        ("--timeout", "nan", "greater than or equal to 0"),
    ],
)
def test_submit_refuses_at_once_what_no_worker_makes(option: str, value: str, said: str) -> None:
    """A value outside what is known to be made is told before any studio is asked: no job fails for it."""
    done = CliRunner().invoke(app, ["submit", "x", "-m", "m", "--studio", NOWHERE, option, value])
    assert (done.exit_code, done.stdout) == (2, "")
    assert option in done.stderr
    assert said in " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())


def test_submit_knows_what_the_engines_know() -> None:
    """Every format that is written here can be asked for, and no other."""
    for ext in submit_command.EXTS:
        check_ext(ext)
    with pytest.raises(JobImpossible) as refused:
        check_ext("gif")
    assert str(refused.value).endswith(", ".join(submit_command.EXTS))


def test_submit_keeps_a_large_seed(studio: LocalStudio) -> None:
    """A seed is queued as it was given, however large; the one after the largest is 0."""
    assert submit(studio.base_url, "-m", "m", "-n", "2", "--seed", str(2**64 - 1))[0] == 0
    assert [job.task["seed"] for job in studio.jobs(JobStatus.QUEUED)] == [2**64 - 1, 0]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "127.0.0.1:8911",
            "'127.0.0.1:8911' is no address of a studio: http:// is missing; write http://127.0.0.1:8911",
        ),
        ("localhost:8911", "http:// is missing; write http://localhost:8911"),
        ("pia:secret@box:8911", "http:// is missing; write http://box:8911"),
        ("pia:sec/ret@box:8911", "http:// is missing; write e.g. http://127.0.0.1:8765"),
        ("http:/box:8911", "http:// is missing; write http://box:8911"),
        ("http://pia:secret@box:none", "its host or port is none; write e.g. http://127.0.0.1:8765"),
        ("http://:8911", "it names no host; write e.g."),
        (
            "ftp://pia:secret@box",
            "'ftp://box' is no address of a studio: it begins with neither http:// nor https://",
        ),
        ("", "it is empty"),
    ],
    ids=["bare", "name", "user", "password", "slash", "port", "host", "scheme", "empty"],
)
def test_submit_says_what_an_address_lacks(address: str, said: str) -> None:
    """An address that is none is told with what it lacks, and without the password that it may hold."""
    found = CliRunner().invoke(app, ["submit", "x", "-m", "m", "--studio", address]).exception
    assert isinstance(found, ConfigError), "exit status 78"
    assert said in str(found)
    assert "sec" not in str(found)
    assert "unreadable" not in str(found)


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (404, {}, {"error": "Not Found"}),
        (404, {}, b"<h1>404</h1>"),
        (405, {}, b""),
        (403, {}, b"<h1>no</h1>"),
        (501, {}, b"<h1>Unsupported method</h1>"),
        (200, {}, b"<h1>Welcome</h1>"),
        (301, {"Location": "https://example.org/"}, b""),
        (200, {}, ["no object"]),
    ],
    ids=["path", "missing", "method", "forbidden", "unsupported", "page", "elsewhere", "shape"],
)
def test_submit_says_that_there_is_no_studio(status: int, headers: dict[str, str], body: Any) -> None:
    """Another web server, or a path below the studio's, is told as no local studio, with the cure."""
    with ScriptedHttp((status, headers, body)) as stranger:
        found, lines, err = submit(f"{stranger.url}/foo", "-m", "m")
    assert (found, lines) == (78, [])
    assert f"--studio: at {stranger.url}/foo there is no local studio" in err


def test_submit_help_names_every_exit_status(tmp_path: Path) -> None:
    """Whoever writes a script finds all statuses in the help."""
    done = subprocess.run(
        [sys.executable, "-m", "studio_worker", "submit", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"0", "1", "2", "74", "75", "77", "78"} <= set(
        re.findall(r"\d+", done.stdout.partition("Options")[0])
    )


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([{"jobId": "../evil"}], 78),
        ([{"jobId": "j"}, *[{"jobId": "j", "status": "done", "result": {"ext": "/../../evil"}}] * 20], 75),
    ],
    ids=["id", "extension"],
)
def test_submit_trusts_no_name_that_a_stranger_answers(
    tmp_path: Path, answers: list[Any], status: int
) -> None:
    """What answers in a studio's place cannot choose where a file is written, and is told as no studio."""
    folder = tmp_path / "in" / "pictures"
    with ScriptedHttp(*((200, {}, answer) for answer in answers)) as stranger:
        process = begin(stranger.url, "-m", "m", "-o", folder, "--timeout", "0.1")
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
