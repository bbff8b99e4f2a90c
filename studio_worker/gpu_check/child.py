"""The process in which rows are looked at: ``python -m studio_worker.gpu_check.child DEVICE FOLDER``.

It may hang, crash, or lose the device: :mod:`runner` ends it then, and starts another. It reads rows as lines
of JSON (``work``, ``given``), and answers with lines of one key each: ``figure`` (name and value, as soon as
it is known) and at last ``found`` (``state``, ``error``, ``trace``, and whether the next row can come here,
``is_usable``).
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from studio_worker.box import process
from studio_worker.errors import DeviceError
from studio_worker.gpu_check.rows import Skipped
from studio_worker.gpu_check.subjects.lab import Lab

_TRACE_LINES = 12


def look(lab: Lab, work: str, given: dict[str, Any]) -> dict[str, Any]:
    """Have the function that ``work`` names look, and say what became of it."""
    module, _, function = work.partition(":")
    answer: dict[str, Any] = {"state": "ok", "error": "", "trace": "", "is_usable": True}
    try:
        getattr(importlib.import_module(f"studio_worker.gpu_check.subjects.{module}"), function)(lab, **given)
    except Skipped as reason:
        answer |= {"state": "skipped", "error": str(reason)}
    except Exception as error:  # whatever a library raises: the other rows are looked at all the same
        answer |= {
            "state": "failed",
            "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            "trace": short_trace(error),
            "is_usable": not isinstance(error, DeviceError) and lab.gpu.works(),
        }
    lab.tidy()
    return answer


def short_trace(error: BaseException) -> str:
    """The end of the traceback, its causes' included."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-_TRACE_LINES:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    # Libraries print; only answers may come out where they are read.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.folder / "compiled"))
    process.prepare()
    # torch comes with it, which reads what was prepared.
    devices = importlib.import_module("studio_worker.gpu_check.devices")
    gpu = devices.gpu_for(options.device, threads=options.threads)
    lab = Lab(gpu, options.folder, small=options.small, tell=lambda name, value: say(figure=[name, value]))
    say(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        say(found=look(lab, asked["work"], asked["given"]))


if __name__ == "__main__":
    main()
