"""torch's CUDA build on a box without a GPU: all that runs before the first kernel, on what boxes install.

Only the driver is faked, by the library that fakes/driver.py builds: torch's own CUDA runtime loads it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import studio_worker.engine
from studio_worker.box.compatibility import PACKAGES
from studio_worker.box.torch_build import installed_torch, version
from studio_worker.demo import MODEL_ID, sample_source
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import prompt
from tests.fakes.driver import build_driver
from tests.lab.service import READY_S, await_status, override

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "packaging" / "lock" / "torch-cuda.txt").read_text()
TORCH = r"torch 2\.\d+\.\d+\+cu\d+"

BOXES = {
    "no driver": ({}, r"libcuda\.so\.1 is not installed; install driver 580 or newer \(.+\), then reboot"),
    "driver too old": (
        {"FAKE_COUNT": "1", "FAKE_CUDA": "12020"},
        rf"the NVIDIA driver 535\.309\.01 knows CUDA 12\.2, and {TORCH} here needs CUDA 13\.\d; "
        r"install driver 580 or newer \(.+\), or .*install .*studio-worker-torch-cuda12",
    ),
    "old card": (
        {"FAKE_COUNT": "1", "FAKE_CAPABILITY": "61"},
        rf"\(Pascal, compute capability 6\.1\): {TORCH} here has code for sm_75, .* and none for it; "
        r".*install .*studio-worker-torch-cuda12",
    ),
    "no device": ({"FAKE_INIT": "100"}, r"no CUDA device is visible; .*nvidia-smi"),
    "taken": ({"FAKE_COUNT": "1", "FAKE_CONTEXT": "46"}, "another process has it for itself: nvidia-smi"),
    "prohibited": ({"FAKE_COUNT": "1", "FAKE_MODE": "2"}, r"PROHIBITED.*; nvidia-smi -i 0000:41:00\.0"),
    # Right in everything that is asked before torch: what is no driver at all is torch's to say.
    "a driver that only seems right": ({"FAKE_COUNT": "1"}, "cuda:0 cannot be used .*; .*reboot"),
}
"""What is wrong with a box, and what its operator is told."""


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each box of BOXES, for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("drivers")
    for name in BOXES.keys() - {"no driver"}:
        build_driver(folder / name, "535.309.01" if name == "driver too old" else "580.65.06")
    return folder


def surroundings(drivers: Path, box: str) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": str(drivers / box), **BOXES[box][0]}


# --- the build ---


def test_build_is_the_one_that_the_lock_pins() -> None:
    """What is tested here is what the package holds, to the version of every library."""
    pins = dict(re.findall(r"^(\S+?)==(\S+)", LOCK, re.MULTILINE))
    assert {name: importlib.metadata.version(name) for name in pins} == pins
    build = installed_torch()
    assert build is not None
    assert (build.version, build.cuda) == (torch.__version__, version(torch.version.cuda))
    assert version(pins["nvidia-cuda-runtime"]) == build.cuda


def test_every_module_of_the_engine_can_be_imported() -> None:
    """Nothing that the engine takes from torch, diffusers and transformers is missing in this build."""
    for module in pkgutil.walk_packages(studio_worker.engine.__path__, "studio_worker.engine."):
        importlib.import_module(module.name)


def test_gpus_that_the_package_is_told_to_fit_are_those_it_has_code_for() -> None:
    """No operator is sent for a package that cannot run their GPU, or away from one that can."""
    (package,) = [each for each in PACKAGES if torch.__version__.endswith(f"+{each.build}")]
    assert tuple(torch.cuda.get_arch_list()) == package.architectures
    assert (version(torch.version.cuda) or (0, 0))[0] == package.cuda_major


def test_memory_setting_of_the_units_is_one_that_this_torch_reads() -> None:
    """PYTORCH_ALLOC_CONF is the variable's name in this version, and expandable_segments a key of it."""
    library = (Path(torch.__file__).parent / "lib" / "libc10.so").read_bytes()
    assert b"PYTORCH_ALLOC_CONF\0" in library
    assert b"expandable_segments" in library


# --- what the operator is told ---


@pytest.mark.parametrize("box", BOXES)
def test_probe_and_service_say_what_is_wrong(site: Path, tmp_path: Path, drivers: Path, box: str) -> None:
    """Each box that cannot work ends the service with 69 before READY; its last line names fault and cure."""
    override(site, '[worker]\ndevice = "cuda"\n')
    with ServiceProcess(site, tmp_path / "log", surroundings(drivers, box)) as running:
        assert running.wait(READY_S) == 69
    assert not any(line.startswith("READY") for line in running.messages)
    last = running.log_lines()[-1]
    assert (last["message"], last["exit_status"]) == ("service ends with an error", 69)
    assert re.search(BOXES[box][1], last["error"]), last["error"]
    assert "Traceback" not in running.log_path.read_text()


def test_box_without_gpu_is_told_so(site: Path, tmp_path: Path) -> None:
    """The default, device = "auto", on a box without GPU: exit status 69 and what to write for the CPU."""
    override(site, '[worker]\ndevice = "auto"\n')
    with ServiceProcess(site, tmp_path / "log") as running:
        assert running.wait(READY_S) == 69
    assert 'device = "cpu"' in running.log_lines()[-1]["error"]


@pytest.mark.parametrize("box", BOXES)
def test_doctor_says_what_is_wrong(site: Path, drivers: Path, box: str) -> None:
    """`studio-worker doctor` fails on the same boxes, with the same words, the cure in a line of its own."""
    override(site, '[worker]\ndevice = "cuda"\n')
    done = subprocess.run(
        [sys.executable, "-m", "studio_worker", "doctor", "--json", "--config", str(site)],
        env={**os.environ, **surroundings(drivers, box)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    told = [f"{each['text']}; {each['cure']}" for each in findings if each["level"] == "failure"]
    assert any(re.search(BOXES[box][1], line) for line in told), told


# --- the CPU ---


@pytest.mark.welcoming_studio
def test_picture_is_made_on_the_cpu(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """The CUDA build makes pictures on the CPU, where that is asked for: the same code to the last kernel."""
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        task = {"kind": "image", "prompt": prompt("red", "gem", "sky"), "ext": "png", "seed": 7}
        job_id = studio.queue_job(model=MODEL_ID, task=task, model_source=sample_source(studio))
        await_status(studio, job_id, "done")
        assert running.stop() == 0
