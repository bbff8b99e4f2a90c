"""Measurements, each beside a peer in the same run where there is one. ``make bench`` prints them.

Speed is never asserted in the test suite: machines differ and are shared. What is printed here is for the
changelog and for whoever suspects a regression.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from studio_worker import sample_model
from studio_worker.demo import write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio

REPEATS = 5
IDLE_S = 30.0


def main() -> None:
    """Run everything and print one table."""
    table = Table("what", "measured", "beside", title=f"{os.cpu_count()} cores")
    for bench in (commands, idle):
        for row in bench():
            table.add_row(*row)
    Console().print(table)


def _median_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def commands() -> list[tuple[str, str, str]]:
    """Start of the command line and of check-config, beside a bare interpreter."""

    def run(*words: str) -> float:
        return _median_s(lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True))

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.toml").write_text(
            f'[state]\ndir = "{folder}/state"\nruntime_dir = "{folder}/run"\n'
            f'[models]\nroot = "{folder}/models"\n'
        )
        bare = run("-c", "pass")
        imported = run("-c", "import studio_worker.cli")
        checked = run("-m", "studio_worker", "check-config", "--config", folder)
    beside = f"python -c pass: {bare:.3f} s"
    return [
        ("import of the command line", f"{imported:.3f} s", beside),
        ("check-config", f"{checked:.3f} s", beside),
    ]


def idle() -> list[tuple[str, str, str]]:
    """CPU and memory of a connected worker without jobs."""
    with tempfile.TemporaryDirectory() as folder, _running(Path(folder)) as (_, service):
        before = _cpu_s(service.process.pid)
        time.sleep(IDLE_S)
        share = (_cpu_s(service.process.pid) - before) / IDLE_S
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        rss_mib = int(status.partition("VmRSS:")[2].split()[0]) / 1024
        service.stop()
    return [
        ("idle worker", f"{100 * share:.2f}% of a core", "goal: under 1%"),
        ("idle worker's memory before torch", f"{rss_mib:.0f} MiB", ""),
    ]


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _running:
    """A local studio and a connected service."""

    def __init__(self, folder: Path) -> None:
        self._studio = LocalStudio(
            folder / "studio.sqlite3", models_dir=sample_model.WEIGHTS.parent, auto_approve=True
        )
        self._folder = folder

    def __enter__(self) -> tuple[LocalStudio, ServiceProcess]:
        studio = self._studio.start()
        (self._folder / "work").mkdir()
        config = write_configuration(studio, self._folder / "work")
        self._service = ServiceProcess(config, self._folder / "service.log")
        self._service.await_message("READY=1", 120.0)
        studio.wait_for(lambda: any(studio.is_online(w.worker_id) for w in studio.workers()), 60.0)
        return studio, self._service

    def __exit__(self, *_: object) -> None:
        self._service.__exit__(None, None, None)
        self._studio.stop()


if __name__ == "__main__":
    main()
