"""Foreign pictures are decoded in a process of their own, which may take so much memory and time and no more.

A picture of a few kB can be made so that decoding takes gigabytes or minutes, in code that nothing can
interrupt. The process (``decoder_child``) is started for the first picture, without torch, and serves the
next ones too, since its start takes longer than most pictures; after one that broke a limit another takes
its place. What comes back is taken for pixels and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

import studio_worker
from studio_worker.errors import JobError, JobImpossible

_MEMORY_BYTES = 1_500_000_000
"""For one picture, beyond what the process takes by itself: 64 million pixels with alpha, and copies of
them."""

_CPU_S = 10
"""For one picture, of the processor's time: a box that is busy with something else refuses none for it."""

_LIMIT_S = 15.0
"""For one picture by the clock, well below the worker's own limit for a step."""

_CHUNK_BYTES = 2**20
_CANCEL_S = 0.1

_COMMAND = (sys.executable, "-P", "-s", "-m", "studio_worker.engine.pictures.decoder_child")
_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        (str(Path(studio_worker.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    ),
    # Its threads would wait for work that never comes, and their stacks count as memory.
    "OPENBLAS_NUM_THREADS": "1",
}
"""All of it: no token and no notify socket. What is missing it does not need."""


class Decoder:
    """Has pictures decoded, one at a time. Called from any thread.

    Args:
        memory_bytes, cpu_s: the limits for one picture.
    """

    def __init__(self, memory_bytes: int = _MEMORY_BYTES, cpu_s: int = _CPU_S) -> None:
        self._memory_bytes = memory_bytes
        self._cpu_s = cpu_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def decode(self, data: bytes, what: str, background: str, check: Callable[[], None]) -> Image.Image:
        """The picture in ``data`` as RGB, upright, of its own size.

        Args:
            what: what the picture is for, to name it in errors.
            background: the colour that it is laid onto where it is transparent.
            check: called while it is waited for; what it raises ends the decoding.

        Raises:
            JobError: as ``images.read`` raises, or the limits were broken.
        """
        with self._lock:
            try:
                answer, picture = _asked(self._running(), data, what, background, check)
            except OSError as error:
                self._end()
                raise JobError(f"the {what} could not be decoded: {error.strerror or error}") from error
            except EOFError as error:
                raise self._ended(self._end(), what) from error
            except BaseException:
                self._end()
                raise
        if answer.get("is_too_large"):
            limit_gb = self._memory_bytes / 1e9
            raise JobImpossible(f"bad input: the {what} takes more than {limit_gb:g} GB of memory to decode")
        if "error" in answer:
            raise (JobImpossible if answer["is_jobs_fault"] else JobError)(answer["error"])
        return picture

    def close(self) -> None:
        """End the process, if there is one; the next picture starts another."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:  # killed while it was idle
            self._end()
        if self._process is None:
            self._process = self._started()
        return self._process

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*_COMMAND, str(self._memory_bytes), str(self._cpu_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a library's complaint about one picture is nobody's log line
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,  # a ctrl-C is not the child's
        )

    def _end(self) -> int | None:
        """The exit status of the process, which it is helped to."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CANCEL_S)  # where it has closed its pipe it is ending: its own status says why
        process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _ended(self, status: int | None, what: str) -> JobError:
        """Why the process has ended instead of answering."""
        if status == -signal.SIGXCPU:
            return JobImpossible(f"bad input: the {what} takes more than {self._cpu_s} s to decode")
        how = signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
        return JobError(f"the {what} could not be decoded: the process for it ended ({how})")


def _asked(
    process: subprocess.Popen[bytes], data: bytes, what: str, background: str, check: Callable[[], None]
) -> tuple[dict[str, Any], Image.Image]:
    """What the process answers, and the picture where that is one.

    Raises:
        EOFError: the process has ended instead.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    head = json.dumps({"what": what, "background": background, "bytes": len(data)})
    try:
        process.stdin.write(head.encode() + b"\n" + data)
        process.stdin.flush()
    except BrokenPipeError:
        raise EOFError from None
    source, until = process.stdout.fileno(), time.monotonic() + _LIMIT_S
    received = bytearray()

    def receive() -> None:
        while not _is_readable(source, _CANCEL_S):
            check()
            if time.monotonic() > until:
                raise JobError(f"the {what} was not decoded within {_LIMIT_S:.0f} s: this box is too busy")
        if not (chunk := os.read(source, _CHUNK_BYTES)):
            raise EOFError
        received.extend(chunk)

    while (end := received.find(b"\n")) < 0:
        receive()
    answer = json.loads(received[:end])
    del received[: end + 1]
    width, height = answer.get("size", (0, 0))
    picture = Image.new("RGB", (width, height))
    # In strips: a large picture is here once, and not also as what was received and as a copy of that.
    rows = max(1, _CHUNK_BYTES // max(1, 3 * width))
    for top in range(0, height, rows):
        strip = (width, min(rows, height - top))
        count = 3 * strip[0] * strip[1]
        while len(received) < count:
            receive()
        picture.paste(Image.frombytes("RGB", strip, bytes(received[:count])), (0, top))
        del received[:count]
    return answer, picture


def _is_readable(source: int, limit_s: float) -> bool:
    waiting = select.poll()  # unlike select(2) also for descriptors beyond 1023
    waiting.register(source, select.POLLIN)
    return bool(waiting.poll(limit_s * 1000))
