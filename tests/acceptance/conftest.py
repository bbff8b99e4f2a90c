"""What the checks in the booted machine share: packages, a layer with them installed, a service at work."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import WEIGHTS
from tests.acceptance import figures
from tests.acceptance.bases import CACHE, SUITE, base_system
from tests.acceptance.box import Box
from tests.acceptance.machine import Machine

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "build" / "packages"
_BEGAN = time.monotonic()


@dataclass(frozen=True)
class Debs:
    """The packages that ``make deb`` has built."""

    worker: Path
    torch: Path
    farm: Path


@pytest.fixture(scope="session")
def debs() -> Debs:
    """The two packages of a box without GPU, and the one of a farm's studio."""
    (worker,) = PACKAGES.glob("studio-worker_*.deb")
    (torch,) = PACKAGES.glob("studio-worker-torch-cpu_*.deb")
    (farm,) = PACKAGES.glob("studio-worker-farm_*.deb")
    return Debs(worker, torch, farm)


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    """A folder for the machines' disks; overlays cannot lie on every file system, so not in /tmp."""
    folder = CACHE / f"work-{os.getpid()}"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def base() -> Path:
    """The suite's bare system, without anything of ours."""
    began = time.monotonic()
    folder = base_system()
    figures.note(f"base system of {SUITE} made or found", f"{time.monotonic() - began:.0f} s")
    return folder


@pytest.fixture(scope="session")
def installed(base: Path, work: Path, debs: Debs) -> Path:
    """A layer in which the packages are installed, as apt leaves it: neither enabled nor started."""
    with Machine([base], work / "installed", keep=True) as machine:
        machine.copy_in(debs.worker, "/root/debs")
        machine.copy_in(debs.torch, "/root/debs")
        began = time.monotonic()
        # Without network: whatever an installation needs is in the packages.
        done = machine.run("unshare", "--net", "sh", "-c", "apt-get install -y /root/debs/*.deb")
        figures.note("apt install, both packages", f"{time.monotonic() - began:.1f} s")
        machine.write("/root/install.log", done.stdout + done.stderr)
        machine.shell("rm -r /root/debs")
        machine.power_off()
    return machine.changes


@pytest.fixture
def box(base: Path, installed: Path, work: Path, tmp_path: Path) -> Iterator[Box]:
    """A machine with the packages installed, and a studio on loopback that it is configured for."""
    with (
        LocalStudio(tmp_path / "studio.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio,
        Machine([installed, base], work / tmp_path.name) as machine,
    ):
        box = Box(machine, studio)
        box.configure()
        try:
            yield box
        finally:
            box.keep_journal(ROOT / "build" / "journals" / f"{tmp_path.name}.log")


def pytest_sessionstart() -> None:
    """The host's tools, on a fresh machine; before anything is collected or built."""
    if shutil.which("systemd-nspawn") is None or shutil.which("mmdebstrap") is None:
        pytest.exit("run it by: make test-deb (it installs what it needs)", 2)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the figures of one of several processes to the one that prints them."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["figures"] = figures.noted()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take in the figures of a process that has come to its end."""
    for name, (value, goal) in getattr(node, "workeroutput", {}).get("figures", {}).items():
        figures.note(name, value, goal)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of figures."""
    figures.note("all checks", f"{time.monotonic() - _BEGAN:.0f} s")
    terminalreporter.section("figures")
    for line in figures.table():
        terminalreporter.line(line)


def sizes(deb: Path) -> tuple[float, float]:
    """Megabytes of a package, and of what it installs."""
    installed_kib = subprocess.run(
        ["dpkg-deb", "--field", str(deb), "Installed-Size"], capture_output=True, text=True, check=True
    ).stdout
    return deb.stat().st_size / 1e6, int(installed_kib) * 1024 / 1e6
