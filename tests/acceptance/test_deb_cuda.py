"""The service with torch's CUDA build under a real systemd, where driver or GPU are missing or will not do.

`make cuda-build` runs it. The build lies in the machine as the torch package would lay it, but by a layer of
the machine's disk: that package is 2.5 GB, and its making takes a quarter of an hour. Faked is the driver.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import WEIGHTS
from tests.acceptance.box import UNIT, Box
from tests.acceptance.machine import Machine
from tests.fakes.driver import build_driver

ROOT = Path(__file__).parents[2]
LAYER = Path(os.environ.get("CUDA_BUILD", ROOT / "build" / "cuda")) / "layer"
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
CONTAINER_LIBRARIES = "/usr/local/nvidia/lib64"

pytestmark = [
    pytest.mark.cuda_build,
    pytest.mark.skipif(not LAYER.is_dir(), reason="torch's CUDA build is not here: make cuda-build"),
]


def stand_in(folder: Path) -> Path:
    """A package of the torch package's name with nothing in it: what it would hold is in the layer."""
    changelog = (ROOT / "debian" / "torch.changelog").read_text()
    version = re.search(r"\((\S+)\)", changelog)
    assert version is not None
    (folder / "DEBIAN").mkdir(parents=True)
    (folder / "DEBIAN" / "control").write_text(
        f"Package: studio-worker-torch-cuda\nVersion: {version[1]}\nArchitecture: amd64\n"
        f"Provides: studio-worker-torch (= {version[1].partition('-')[0]}), "
        f"studio-worker-torch-cp311 (= {version[1].partition('-')[0]})\n"
        "Maintainer: nobody <nobody@localhost>\nDescription: stands in for torch's CUDA build\n"
    )
    deb = folder.with_suffix(".deb")
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(folder), str(deb)], check=True)
    return deb


@pytest.fixture(scope="module")
def with_cuda(base: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The layers of a machine with the worker's package installed, and torch's CUDA build."""
    (worker,) = (ROOT / "build" / "packages").glob("studio-worker_*.deb")
    deb = stand_in(tmp_path_factory.mktemp("deb") / "torch")
    with Machine([LAYER, base], work / "cuda", keep=True) as machine:
        machine.copy_in(worker, "/root/debs")
        machine.copy_in(deb, "/root/debs")
        machine.run("unshare", "--net", "sh", "-c", "apt-get install -y /root/debs/*.deb")
        machine.shell("rm -r /root/debs")
        machine.power_off()
    return [machine.changes, LAYER, base]


@pytest.fixture
def box(with_cuda: list[Path], work: Path, tmp_path: Path) -> Iterator[Box]:
    """A machine as its operator has it after the installation, but for the studio."""
    with (
        LocalStudio(tmp_path / "studio.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio,
        Machine(with_cuda, work / tmp_path.name) as machine,
    ):
        box = Box(machine, studio)
        box.configure(worker={"device": "auto"})
        try:
            yield box
        finally:
            box.keep_journal(ROOT / "build" / "journals" / f"{tmp_path.name}.log")


def install_driver(box: Box, tmp_path: Path, folder: str, version: str, **environment: object) -> None:
    """Put a driver's library into a folder of the machine; it says what ``environment`` tells it to."""
    built = build_driver(tmp_path / "driver", version)
    name = f"libcuda.so.{version}"
    box.machine.copy_in(built / name, folder)
    box.machine.run("ln", "-s", name, f"{folder}/libcuda.so.1")
    box.machine.run("ldconfig")
    told = [f"Environment={name.upper()}={value}" for name, value in environment.items()]
    box.drop_in("[Service]", "RestartSec=100ms", *told)
    box.configure(worker={"device": "cuda"})


def assert_refused(box: Box, says: str) -> None:
    """The start fails with 69 before READY and is tried again; journal and doctor have the same words."""
    assert not box.start(check=False)

    def ends() -> list[dict[str, Any]]:
        return [line for line in box.log_lines() if line["message"] == "service ends with an error"]

    box.machine.await_that("a second try", lambda: len(ends()) >= 2)
    assert int(box.show("NRestarts")) >= 1
    box.stop()
    for end in ends():
        assert (end["exit_status"], end["level"]) == (69, "CRITICAL")
        assert re.search(says, end["error"]), end["error"]
    assert "service ready" not in box.messages()
    assert "Traceback" not in box.tail()
    assert "status=69/UNAVAILABLE" in box.machine.run("journalctl", f"--unit={UNIT}", "--no-pager").stdout


def test_box_without_gpu_is_told_so(box: Box) -> None:
    """As installed, on a machine without GPU: 69, what to write for the CPU, and systemd goes on trying."""
    box.drop_in("[Service]", "RestartSec=100ms")
    assert_refused(box, r'this machine shows no NVIDIA GPU; .*device = "cpu"')


def test_box_without_driver_is_told_which(box: Box) -> None:
    """device = "cuda" without a driver: which one this torch needs, and from where."""
    box.configure(worker={"device": "cuda"})
    box.drop_in("[Service]", "RestartSec=100ms")
    assert_refused(box, r"libcuda\.so\.1 is not installed; install driver 580 or newer \(")


@pytest.mark.parametrize("folder", [LIBRARIES, CONTAINER_LIBRARIES])
def test_driver_that_is_too_old_is_told_with_the_cure(box: Box, tmp_path: Path, folder: str) -> None:
    """Debian 12's own driver: both versions and what to install; also where a container's host has put it."""
    install_driver(box, tmp_path, folder, "535.309.01", fake_count=1, fake_cuda=12020)
    assert_refused(
        box,
        r"the NVIDIA driver 535\.309\.01 knows CUDA 12\.2, and torch \S+\+cu\d+ here needs CUDA 13\.\d; "
        r"install driver 580 or newer \(.+\), or .*install .*studio-worker-torch-cuda12",
    )
    doctor = box.machine.run("env", "FAKE_COUNT=1", "FAKE_CUDA=12020", "studio-worker", "doctor", check=False)
    assert doctor.returncode == 1
    assert "the NVIDIA driver 535.309.01 knows CUDA 12.2" in doctor.stdout


def test_driver_that_sees_no_gpu_is_told_with_the_cure(box: Box, tmp_path: Path) -> None:
    """A driver that fits and shows no device: 69, and where to look."""
    install_driver(box, tmp_path, LIBRARIES, "580.65.06", fake_init=100)
    assert_refused(box, r"no CUDA device is visible; .*nvidia-smi")


def test_torch_that_cannot_use_the_gpu_says_so_in_the_sandbox(box: Box, tmp_path: Path) -> None:
    """All is right until torch itself starts its CUDA runtime under the unit's limits: 69, with a cure."""
    install_driver(box, tmp_path, LIBRARIES, "580.65.06", fake_count=1)
    assert_refused(box, r"cuda:0 cannot be used .*; .*reboot")


def test_cuda_build_makes_pictures_on_the_cpu(box: Box) -> None:
    """torch with CUDA and its libraries load in the sandbox; where the CPU is asked for, pictures come."""
    box.configure()
    box.start()
    job_id = box.queue_picture()
    box.await_job(job_id, "done")
