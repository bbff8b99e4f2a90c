"""How the command of a studio ends: at once, or after load balancers have heard of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import requests

from tests.lab.service import await_that

WAIT_S = 30.0
LONG_S = 600
"""So long that a test which waited for it would fail."""
TOKEN = "a token of sufficient length"

pytestmark = pytest.mark.sqlite


class Command:
    """``studio-worker local-studio`` at work."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self._address = address

    def status(self, path: str) -> int:
        """What it answers there."""
        return requests.get(self._address + path, timeout=WAIT_S).status_code

    def queue(self) -> int:
        """What it answers to a new job."""
        job = {"model": "placeholder", "task": {"prompt": "a red fox"}}
        return requests.post(f"{self._address}/api/jobs", json=job, timeout=WAIT_S).status_code


@contextmanager
def running(folder: Path, *options: str, said: IO[str] | None = None) -> Iterator[Command]:
    words = ("-m", "studio_worker", "local-studio", "--port", "0", "--data", str(folder), *options)
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=said, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield Command(process, process.stdout.readline().rpartition(" ")[2].strip())
        finally:
            process.kill()


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_studio_that_leaves_says_so_and_serves_until_told_again(
    tmp_path: Path, again: signal.Signals
) -> None:
    """SIGTERM with --drain: not ready, for balancers, but alive and at work; a second signal ends it."""
    with running(tmp_path, "--drain", str(LONG_S)) as command:
        assert command.status("/health/ready") == 200
        command.process.send_signal(signal.SIGTERM)
        await_that(lambda: command.status("/health/ready") == 503, "it says that it leaves")
        assert command.status("/health/live") == 200
        assert command.queue() == 201
        command.process.send_signal(again)
        assert command.process.wait(WAIT_S) == 0


def test_person_at_the_terminal_does_not_wait(tmp_path: Path) -> None:
    """Ctrl-C ends a studio at once, whatever balancers were to hear first."""
    with running(tmp_path, "--drain", str(LONG_S)) as command:
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(WAIT_S) == 0


def test_signals_that_come_all_at_once_end_it(tmp_path: Path) -> None:
    """Whoever is told to end many times over ends, wherever that meets it."""
    script = """
import os, signal, threading
from studio_worker.local_studio.ending import Ending
def shower():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
for _ in range(200):
    ending = Ending()
    with ending.heeding_signals(None):
        shooting = threading.Thread(target=shower)
        shooting.start()
        ending.asked.wait()
        ending.now.wait()
        shooting.join()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=WAIT_S, check=False).returncode == 0


@pytest.mark.parametrize(
    ("behind", "leaves_first"), [((), False), (("--behind-proxy", "127.0.0.1"), True)], ids=["desk", "proxy"]
)
def test_studio_behind_a_proxy_leaves_before_it_ends(
    tmp_path: Path, behind: Sequence[str], leaves_first: bool
) -> None:
    """Unasked only a studio that has a proxy in front says first that it leaves; one at a desk just ends."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    log = tmp_path / "log"
    with log.open("w") as said, running(tmp_path, "--token-file", str(token), *behind, said=said) as command:
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(WAIT_S) == 0
    assert ("not ready any more" in log.read_text()) is leaves_first
