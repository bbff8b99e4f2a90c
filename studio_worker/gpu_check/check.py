"""The check as a whole: from the device's name to an exit status."""

from __future__ import annotations

import fnmatch
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from studio_worker.box import process
from studio_worker.box.device import Device, find_device, probe
from studio_worker.box.ram import available_ram_bytes
from studio_worker.errors import ConfigError, DeviceError
from studio_worker.files import output_problem
from studio_worker.gpu_check.places import folder_for_files
from studio_worker.gpu_check.programme import rows
from studio_worker.gpu_check.report import Report
from studio_worker.gpu_check.rows import Found
from studio_worker.gpu_check.runner import Runner, command_for

MINUTES = 8.0

_PROCESS_BYTES = 2 << 30
"""What one process with a tiny model takes of a GPU, most of it CUDA's own; of RAM it is twice as much."""

_TOGETHER = 6


def run_check(
    setting: str,
    output: Path,
    *,
    only: str = "*",
    minutes: float = MINUTES,
    work: Path | None = None,
    show: Callable[[str], None] = print,
) -> int:
    """Look at everything on the device that ``setting`` names.

    Returns the exit status: 0 where nothing failed, 1 where something did, 69 where it does not compute.

    Args:
        output: the file for everything that is found.
        only: a pattern (fnmatch) of the names of rows.
        minutes: rows that are left after so many are left out.
        work: for files; by default a folder that is large enough and on a disk.
        show: is given each line of the table.

    Raises:
        ConfigError: no row matches, or nothing can be written where it should be.
        DeviceError: there is no such device.
    """
    began = time.monotonic()
    process.prepare()
    _check_places(output, work)
    small = setting == "cpu"
    chosen = [row for row in rows(small=small) if fnmatch.fnmatch(row.name, only)]
    if not chosen:
        raise ConfigError(f"no row has a name like {only!r}", cure="name others, as in --only 'flux*'")
    device = find_device(setting)
    report = Report(output, f"{device.name} ({device.description})", show)
    show(f"studio-worker gpu-check on {device.name} ({device.description})")
    facts = probe(device.name)
    seconds = time.monotonic() - began
    found = Found(
        "probe", "ok" if facts.pop("ok") else "failed", round(seconds, 2), facts, facts.pop("error")
    )
    report.add(found)
    if found.state == "failed":
        report.close(time.monotonic() - began)
        return DeviceError.exit_status
    with ExitStack() as at_the_end:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                at_the_end.callback(signal.signal, number, signal.signal(number, _leave))
        folder = Path(tempfile.mkdtemp(prefix="studio-worker-gpu-check-", dir=work or folder_for_files()))
        at_the_end.callback(shutil.rmtree, folder, ignore_errors=True)
        runner = _runner(device, folder, report, small=small)
        at_the_end.callback(runner.end)
        runner.run(chosen, deadline=began + 60 * minutes)
    return report.close(time.monotonic() - began)


def _runner(device: Device, folder: Path, report: Report, *, small: bool) -> Runner:
    together = _processes(device)
    threads = max(1, (os.cpu_count() or 1) // together)
    return Runner(
        command_for(device.name, folder, small=small),
        command_for(device.name, folder, small=small, threads=threads),
        folder,
        together=together,
        on_found=report.add,
    )


def _check_places(output: Path, work: Path | None) -> None:
    """Whether what is found can be written, asked before minutes are spent on finding it."""
    if problem := output_problem(output):
        raise ConfigError(problem, cure="name another -o FILE")
    if work is not None and not (work.is_dir() and os.access(work, os.W_OK | os.X_OK)):
        raise ConfigError(f"folder {work} is not there or not writable", cure="name another --work DIR")


def _leave(number: int, _frame: FrameType | None) -> None:
    """At SIGTERM, and where the terminal goes away: whatever was started is ended, files are removed, what
    was found stays.
    """
    raise SystemExit(128 + number)


def _processes(device: Device) -> int:
    """How many processes there may be for rows that run beside each other."""
    cores = (os.cpu_count() or 1) // 2
    memory = min(int(device.memory_gb * 1e9), available_ram_bytes() // 2) // _PROCESS_BYTES
    return max(1, min(_TOGETHER, cores, memory))
