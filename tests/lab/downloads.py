"""Downloads as tests make them, in this process and in another one, and what they leave on disk."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio_worker.download import download_file
from studio_worker.errors import DownloadCancelled
from studio_worker.models import ModelFile
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import ServedFile

BODY = b"a tiny pretend model"
BODY_SHA256 = "7820645b979bcfe59530fcd3b377c10e20bffed93396b8b3ffbd506f06aaacfe"
BIG = random.Random(1).randbytes(1_000_000)
TRUNCATED = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nonly a few bytes"
QUICK = Policy(connect_s=5, stall_s=5, delays_s=(0.0, 0.0, 0.0))
"""Tries again as often as in life, without the waits."""


CHILD = """
import json, sys
from pathlib import Path
from studio_worker.download import download_file
url, dest, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
print("started", flush=True)
download_file(url, dest, progress=lambda done, total: print(done, flush=True), **options)
print("done", flush=True)
"""


def model_file(filename: str, url: str, sha256: str | None = None) -> ModelFile:
    return ModelFile(role="model", url=url, filename=filename, sha256=sha256)


def warnings(logged: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in logged.records if record.levelno >= logging.WARNING]


def files_in(folder: Path) -> set[str]:
    """Every file below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def staged(folder: Path) -> Path:
    """The one kept part below ``folder``."""
    (part,) = folder.rglob("*.part")
    return part


def start_child(file: ServedFile, dest: Path, **options: Any) -> subprocess.Popen[str]:
    arguments = [file.url, str(dest), json.dumps(options)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def await_line(child: subprocess.Popen[str], is_wanted: Callable[[str], bool]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if is_wanted(line.strip()):
            return
    pytest.fail("the process ended before it got so far")


def await_bytes(child: subprocess.Popen[str], count: int) -> None:
    await_line(child, lambda line: line.isdecimal() and int(line) >= count)


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def leave_part(file: ServedFile, dest: Path, count: int, **options: Any) -> None:
    """Cancel a download of ``file`` when ``count`` bytes have come, the server is well afterwards."""
    cancel = threading.Event()
    file.hold_after = count

    def stop(done: int, _: int | None) -> None:
        if done == count:
            cancel.set()

    with pytest.raises(DownloadCancelled):
        download_file(file.url, dest, cancel=cancel, progress=stop, policy=QUICK, **options)
    assert file.held.wait(10)
    file.hang_up()
    assert staged(dest.parent).stat().st_size == count


class Waits:
    """Stands in for waiting: keeps the seconds asked for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, cancel: threading.Event, seconds: float) -> bool:
        self.seconds.append(seconds)
        return cancel.is_set()
