"""`studio-worker submit` where a studio goes away, or its answers do, while orders are still queued."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_worker.local_studio import Door, LocalStudio
from studio_worker.local_studio.rules import JobStatus
from tests.fakes.machine import SOURCE
from tests.fakes.proxy import Proxy, by_itself, reset
from tests.fakes.scripted import ScriptedHttp

TOKEN = "a token of sufficient length"
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_PAGE = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 12\r\nConnection: close\r\n\r\n<h1>no</h1>\r\n"
_WELCOME = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\n<h1>hi</h1>\r\n"
_AWAY = b'HTTP/1.1 503 Away\r\nContent-Length: 16\r\nConnection: close\r\n\r\n{"error":"away"}'


class Forgetful(Proxy):
    """Before a studio. What becomes of each order is its next fault: ``reset`` before the studio hears of it,
    or a ``stranger`` answers; or the studio has queued it and its answer is ``lost``, or another's: ``page``
    or ``away``.
    """

    def __init__(self, port: int, *faults: str) -> None:
        self._port = port
        self._faults = deque(faults)
        super().__init__()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        body = await reader.readexactly(int(length[1]) if length else 0)
        fault = self._faults.popleft() if head.startswith(b"POST") and self._faults else ""
        if fault == "reset":
            reset(writer)
            return
        if fault == "stranger":
            writer.write(_WELCOME)
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        back.write(by_itself(head) + body)
        answer = await there.read()
        back.close()
        if fault == "lost":
            reset(writer)
            return
        writer.write({"page": _PAGE, "away": _AWAY}.get(fault, answer))
        await writer.drain()


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    with LocalStudio(tmp_path / "data" / "studio.sqlite3") as running:
        running.register_model("m", SOURCE)
        yield running


def submit(address: str, *args: str) -> tuple[int, list[str], str]:
    """Exit status, lines, and what was complained of."""
    command = [
        sys.executable,
        "-m",
        "studio_worker",
        "submit",
        "a red potion",
        "-m",
        "m",
        "--studio",
        address,
    ]
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_submit_makes_no_order_two_jobs(studio: LocalStudio) -> None:
    """Answers that are lost, whoever lost them, cost neither a job nor the command, and double nothing."""
    faults = ("lost", "", "away", "page", "", "reset", "reset", "", "stranger")  # the next try at once, once
    with Forgetful(studio.port, *faults) as proxy:
        status, lines, err = submit(proxy.url, "-n", "4")
    assert status == 0
    assert lines == [f"{job.job_id} queued" for job in studio.jobs(JobStatus.QUEUED)]
    assert len(lines) == 4
    told = [line.partition("since ")[2].partition(": ")[2] for line in err.splitlines()]
    assert told == [
        "Connection reset by peer",
        f"the studio at {proxy.url} says: away",
        "Connection reset by peer",
        f"what answers at {proxy.url} is no local studio",
    ]


def test_submit_waits_with_one_patience(studio: LocalStudio) -> None:
    """With --wait it is the same while orders are queued; the time is over for both together."""
    with Forgetful(studio.port, "away", "", *["lost"] * 99) as proxy:
        status, lines, err = submit(proxy.url, "-n", "4", "--wait", "--timeout", "3")
    job_ids = [job.job_id for job in studio.jobs(JobStatus.QUEUED)]
    assert (status, len(job_ids)) == (75, 2)
    assert lines == [f"{job_ids[0]} queued", f"{job_ids[1]} unknown it may be in the studio"]
    assert f"{job_ids[0]} queued\n" in err


def test_submit_is_refused_after_all(studio: LocalStudio) -> None:
    """A refusal after a lost answer ends the command, which names the order that may be there after all."""
    answers = [(503, {}, {"error": "away"}), (400, {}, {"error": "no more"})]
    with ScriptedHttp(*answers) as proxy:
        status, (line,), err = submit(proxy.url)
    assert status == 1
    assert line.endswith(" unknown it may be in the studio")
    assert "the studio says: no more" in err


def test_submit_knows_a_studio_that_names_jobs_itself() -> None:
    """A studio of before gives each job an id of its own: it is told by that id, and no order is repeated."""
    with ScriptedHttp((201, {}, {"jobId": "its-own"}), (503, {}, {"error": "away"})) as older:
        status, lines, err = submit(older.url, "-n", "3")
    assert status == 75
    assert [line.split()[1] for line in lines] == ["queued", "unknown"]
    assert lines[0] == "its-own queued"
    assert "says: away" in err
    assert len(older.heard) == 2


def test_submit_tells_a_wrong_token_from_none(tmp_path: Path) -> None:
    """Where the token of the file is not the studio's, the file is named."""
    secret = tmp_path / "token"
    secret.write_text(TOKEN + " but another")
    secret.chmod(0o600)
    with LocalStudio(tmp_path / "studio.sqlite3", door=Door(token=TOKEN)) as studio:
        status, lines, err = submit(studio.base_url, "--token-file", str(secret))
    assert (status, lines) == (77, [])
    assert f"{studio.base_url} wants another token than the one in {secret}" in err
