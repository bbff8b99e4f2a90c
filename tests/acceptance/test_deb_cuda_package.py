"""studio-worker-torch-cuda itself: clean by Debian's checker, and installed by apt from a repository.

`make cuda-deb` builds it (2.7 GB of wheels) and runs this; everything else does without. What the service
says of drivers and GPUs is test_deb_cuda.py's, which needs the build and not the package.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import WEIGHTS
from tests.acceptance import figures
from tests.acceptance.archive import Archive, KeyRing
from tests.acceptance.box import UNIT, Box
from tests.acceptance.conftest import PACKAGES, sizes
from tests.acceptance.machine import Machine
from tests.fakes.driver import build_driver

NAME = "studio-worker-torch-cuda"
SITE_PACKAGES = "/usr/lib/studio-worker/lib/python3.11/site-packages"
FOUND = list(PACKAGES.glob(f"{NAME}_*.deb"))

pytestmark = [
    pytest.mark.skipif(not FOUND, reason=f"{NAME} is not built: make cuda-deb"),
    pytest.mark.timeout(3600),  # on a slow disk
]


@pytest.fixture
def archive(work: Path, tmp_path: Path) -> Iterator[Archive]:
    """A repository with the worker's package and this one."""
    folder = work / f"archive-{tmp_path.name}"
    folder.mkdir()
    with KeyRing() as keys, Archive(folder, keys) as archive:
        archive.publish(*PACKAGES.glob("studio-worker_*.deb"), *FOUND, suite="stable")
        yield archive


def end_of(box: Box) -> str:
    """What the service says when it has ended with 69 before READY."""
    assert not box.start(check=False)
    box.stop()
    ends = [line for line in box.log_lines() if line["message"] == "service ends with an error"]
    assert (ends[-1]["exit_status"], box.show("NRestarts")) == (69, "0")
    assert "service ready" not in box.messages()
    return str(ends[-1]["error"])


def test_apt_installs_it_and_a_box_without_gpu_is_told_so(
    archive: Archive, base: Path, work: Path, tmp_path: Path
) -> None:
    """One apt install of studio-worker brings it; without a GPU the service ends with 69 and says what to do,
    an old card is told which package is for it, on the CPU pictures come, and purging leaves nothing.
    """
    with (
        LocalStudio(tmp_path / "studio.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio,
        Machine([base], work / tmp_path.name) as machine,
    ):
        archive.subscribe(machine)
        began = time.monotonic()
        machine.run("apt-get", "-y", "-q", "-o", "Dpkg::Use-Pty=0", "install", "studio-worker", limit_s=1800)
        figures.note(f"apt install of {NAME} over HTTP", f"{time.monotonic() - began:.0f} s")
        packed, unpacked = sizes(FOUND[0])
        figures.note(f"size of {NAME}", f"{packed:.0f} MB, {unpacked:.0f} MB installed")
        places = "/var/cache/apt/archives", SITE_PACKAGES
        kib = [int(line.split()[0]) for line in machine.run("du", "-sk", *places).stdout.splitlines()]
        figures.note("disk, with what apt keeps", f"{sum(kib) * 1024 / 1e9:.1f} GB")

        box = Box(machine, studio)
        box.drop_in("[Service]", "Restart=no", "Environment=FAKE_COUNT=1", "Environment=FAKE_CAPABILITY=61")
        box.configure(worker={"device": "auto"})
        assert re.search(r'this machine shows no NVIDIA GPU; .*device = "cpu"', end_of(box))
        doctor = machine.run("studio-worker", "doctor", check=False)
        assert doctor.returncode == 1
        assert "shows no NVIDIA GPU" in doctor.stdout

        driver = build_driver(tmp_path / "driver", "580.65.06")
        machine.copy_in(driver / "libcuda.so.580.65.06", "/usr/local/nvidia/lib64")
        machine.run("ln", "-s", "libcuda.so.580.65.06", "/usr/local/nvidia/lib64/libcuda.so.1")
        box.configure(worker={"device": "cuda"})
        assert re.search(
            r"\(Pascal, compute capability 6\.1\): torch \S+\+cu130 here has code for sm_75, .* none for it; "
            r".*install .*studio-worker-torch-cuda12$",
            end_of(box),
        )

        box.configure()
        box.start()
        box.await_job(box.queue_picture(), "done")
        box.stop()
        box.keep_journal(PACKAGES.parent / "journals" / f"{tmp_path.name}.log")
        machine.run("apt-get", "-y", "-q", "purge", "studio-worker", NAME, limit_s=600)
        assert not machine.path("/usr/lib/studio-worker").exists()
        assert machine.show(UNIT, "LoadState") == "not-found"


def test_lintian_has_nothing_to_say(work: Path) -> None:
    """Neither errors nor warnings of 4.7 GB; what is overridden is explained beside it."""
    began = time.monotonic()
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", str(FOUND[0])],
        env={**os.environ, "TMPDIR": str(work)}, capture_output=True, text=True,  # it leaves files behind
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    figures.note(f"lintian of {NAME}", f"no errors, no warnings ({time.monotonic() - began:.0f} s)")
