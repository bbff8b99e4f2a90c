"""The process that decodes foreign pictures: ``decoder_child MEMORY_BYTES CPU_S``.

It reads a line of JSON (``what``, ``background``, ``bytes``) and so many bytes, and answers with a line of
JSON (``size``, and the picture's RGB after it; or ``is_too_large``; or ``error`` and ``is_jobs_fault``),
until its input ends. It starts and writes nothing else, and its limits end it.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import BinaryIO

from studio_worker.engine import images
from studio_worker.errors import JobError


def main() -> None:
    source, target = sys.stdin.buffer, sys.stdout.buffer
    memory_bytes, cpu_s = map(int, sys.argv[1:])
    _limit_memory(memory_bytes)
    while line := source.readline():
        _limit_time(cpu_s)
        asked = json.loads(line)
        _answer(target, source.read(asked["bytes"]), asked["what"], asked["background"])


def _answer(target: BinaryIO, data: bytes, what: str, background: str) -> None:
    pixels = b""
    try:
        picture = images.read(data, what, background)
        pixels = picture.tobytes()
        head: dict[str, object] = {"size": picture.size}
    except MemoryError:
        head = {"is_too_large": True}
    except JobError as error:
        head = {"error": str(error), "is_jobs_fault": error.is_jobs_fault}
    target.write(json.dumps(head).encode() + b"\n")
    target.write(pixels)
    target.flush()


def _limit_memory(memory_bytes: int) -> None:
    """All that is allocated from here on; and no file is written, a dump with a studio's picture neither."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    own_bytes = pages * os.sysconf("SC_PAGE_SIZE")
    _limit(resource.RLIMIT_AS, own_bytes + memory_bytes)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(what: int, limit: int) -> None:
    resource.setrlimit(what, (limit, limit))


def _limit_time(cpu_s: int) -> None:
    """From here on: the system counts whole seconds of the process's time, its start included."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + cpu_s, hard))


if __name__ == "__main__":
    main()
