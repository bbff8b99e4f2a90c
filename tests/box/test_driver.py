"""A box whose driver, GPU or torch will not do: the service ends with 69, doctor fails, both name the cure.

The driver is the tests' own; the torch that does not fit it is a folder that says so and cannot be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studio_worker.box.device import find_device
from studio_worker.box.driver import find_driver, surroundings
from studio_worker.box.torch_build import TorchBuild, installed_torch
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import DeviceError
from tests.fakes.driver import build_driver
from tests.fakes.servers import refused_url
from tests.fakes.system_files import bus
from tests.lab.service import READY_S

ROOT = Path(__file__).parents[2]

CUDA_13 = """
from typing import Optional
__version__ = '2.13.0+cu130'
cuda: Optional[str] = '13.0'
hip: Optional[str] = None
"""


def box(folder: Path) -> Path:
    """A configuration that wants a GPU."""
    folder.mkdir()
    (folder / "config.toml").write_text(
        f'[studio]\napi_base_url = "{refused_url("")}"\n[worker]\ndevice = "cuda"\n[log]\nformat = "json"\n'
        f'[state]\ndir = "{folder}/state"\nruntime_dir = "{folder}/run"\n[models]\nroot = "{folder}/models"\n'
    )
    return folder


ASKED = """
from torch import cuda, version
__version__ = version.__version__
class device:
    def __init__(self, name): self.type = name.partition(":")[0]
"""
"""All of torch that is used before a GPU is."""


def torch_for(folder: Path, version: str, architectures: str = "") -> str:
    """A torch of which the version file can be read, and with ``architectures`` what it has code for; for
    PYTHONPATH.
    """
    (folder / "torch").mkdir(parents=True)
    answers = ASKED if architectures else "raise AssertionError('torch was touched')\n"
    (folder / "torch" / "__init__.py").write_text(answers)
    (folder / "torch" / "cuda.py").write_text(f"def get_arch_list(): return {architectures.split()}\n")
    (folder / "torch" / "version.py").write_text(version)
    return f"{folder}{os.pathsep}{ROOT}"


def end_of(config: Path, log: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and last error of the service."""
    with ServiceProcess(config, log, environment) as running:
        status = running.wait(READY_S)
        assert "READY=1" not in running.messages
        return status, str(running.log_lines()[-1].get("error"))


def doctor_of(config: Path, environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What doctor finds, by the checks' names."""
    done = subprocess.run(
        [sys.executable, "-m", "studio_worker", "doctor", "--config", str(config), "--json"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return {each["check"]: each for each in json.loads(done.stdout)["findings"]}


HAS_CUDA_TORCH = (installed_torch() or TorchBuild("")).cuda is not None

OLD = (
    "the NVIDIA driver 535.309.01 knows CUDA 12.2, and torch 2.13.0+cu130 here needs CUDA 13.0",
    "install driver 580 or newer (",
    "studio-worker-torch-cuda12",
)
"""What an Ada card with Debian 12's driver is told."""

LACKS_CODE = ("has code for sm_75, sm_80, sm_120 and none for it", "studio-worker-torch-cuda12")
"""What an old card with a new driver is told."""


@pytest.mark.parametrize(
    ("plays", "check", "says"),
    [
        ({}, "driver", ("libcuda.so.1 is not installed", "install driver 580 or newer (")),
        ({"FAKE_CUDA": "12020", "torch": CUDA_13}, "driver", OLD),
        (
            {"FAKE_CUDA": "12080", "FAKE_CAPABILITY": "120", "torch": CUDA_13},
            *("driver", ("knows CUDA 12.8", "install driver 580 or newer (")),
        ),
        (
            {"FAKE_CAPABILITY": "61", "torch": CUDA_13, "has_code_for": "sm_75 sm_80 sm_120"},
            *("compute", ("Fake GPU A (Pascal, compute capability 6.1)", *LACKS_CODE)),
        ),
        (
            {"FAKE_CAPABILITY": "70", "torch": CUDA_13, "has_code_for": "sm_75 sm_80 sm_120"},
            *("torch", ("Fake GPU A (Volta, compute capability 7.0)", "studio-worker-torch-cuda12")),
        ),
        ({"FAKE_INIT": "100"}, "driver", ("start the NVIDIA driver", "CUDA_VISIBLE_DEVICES")),
        ({"FAKE_COUNT": "0"}, "driver", ("cuda:0 does not exist; this machine has 0 CUDA device(s)",)),
        ({"FAKE_MODE": "2"}, "driver", ("compute mode PROHIBITED", "nvidia-smi -i 0000:41:00.0 -c DEFAULT")),
        (
            {"FAKE_MODE": "3", "FAKE_CONTEXT": "46"},
            "compute",
            ("use cuda:0", "another process has it for itself"),
        ),
        ({"FAKE_CONTEXT": "2"}, "compute", ("use cuda:0", "another process uses its memory")),
        pytest.param(
            *(
                {"FAKE_CUDA": "13000"},
                "compute",
                ("it has none", "studio-worker-torch-cuda"),
            ),
            marks=pytest.mark.skipif(HAS_CUDA_TORCH, reason="this torch has CUDA"),
        ),
    ],
    ids=[
        *("none", "old", "old-blackwell", "pascal", "volta", "no-device"),
        *("no-gpu", "prohibited", "busy", "full", "cpu-torch"),
    ],
)
def test_box_that_cannot_compute_is_told_why(
    tmp_path: Path, plays: dict[str, str], check: str, says: tuple[str, ...]
) -> None:
    """No driver, one too old, no GPU, one that is taken, no torch for it: exit status 69 and the cure in the
    log, and doctor fails on the line of what is in the way.
    """
    if not plays and find_driver() is not None:
        pytest.skip("the linker would go on to the real driver of this machine")
    driver = tmp_path / "driver"
    (build_driver(driver, "535.309.01") if plays else driver.mkdir())
    environment = {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(ROOT), "FAKE_COUNT": "1", **plays}
    if "torch" in plays:
        build, known = environment.pop("torch"), environment.pop("has_code_for", "")
        environment["PYTHONPATH"] = torch_for(tmp_path / "site", build, known)
    config = box(tmp_path / "etc")
    status, error = end_of(config, tmp_path / "log", environment)
    assert status == 69
    for word in says:
        assert word in error
    found = doctor_of(config, environment)[check]
    assert found["level"] == "failure"
    for word in says:
        assert word in f"{found['text']}; {found['cure']}"
    assert found["cure"]


def test_driver_that_the_linker_does_not_know_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container whose host puts the driver into /usr/local/nvidia/lib64 has a GPU."""
    monkeypatch.setenv("FAKE_COUNT", "1")
    build_driver(tmp_path / "usr/local/nvidia/lib64", "580.95.05")
    assert find_device("cuda", tmp_path).capability == (8, 9)


@pytest.mark.parametrize(
    ("devices", "setting", "says"),
    [
        ([("0x1002", "0x030000")], "auto", "a GPU of AMD, which is not supported, and no NVIDIA GPU"),
        ([("0x1002", "0x030000")], "cuda", "a GPU of AMD, which is not supported, and no NVIDIA GPU"),
        ([("0x8086", "0x038000")], "auto", "a GPU of Intel, which is not supported, and no NVIDIA GPU"),
        (
            [("0x8086", "0x030000"), ("0x1002", "0x030000")],
            *("auto", "a GPU of AMD and one of Intel, which is not supported, and no NVIDIA GPU"),
        ),
        ([("0x1af4", "0x030000"), ("0x1002", "0x060000")], "auto", "shows no NVIDIA GPU"),
        ([("0x8086", "0x030000"), ("0x10de", "0x030000")], "auto", "libcuda.so.1 is not installed"),
    ],
    ids=["amd", "amd-cuda", "intel", "both", "virtual", "beside-nvidia"],
)
def test_gpu_of_another_maker_is_told_as_what_it_is(
    tmp_path: Path, devices: list[tuple[str, str]], setting: str, says: str
) -> None:
    """An AMD or Intel GPU is not "no GPU": its owner is told that it is seen and does not do."""
    with pytest.raises(DeviceError) as caught:
        find_device(setting, bus(tmp_path, *devices))
    assert says in str(caught.value)


def test_torch_is_not_imported_to_see_what_it_is(tmp_path: Path) -> None:
    """What torch was built for is read without importing it, also of one that cannot be imported."""
    script = (
        "import sys; from studio_worker.box.torch_build import installed_torch; "
        "print(installed_torch()); print(*sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": torch_for(tmp_path, CUDA_13)}
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    build, modules = answer.splitlines()
    assert build == str(TorchBuild("2.13.0+cu130", (13, 0)))
    assert "torch" not in modules.split()


@pytest.mark.parametrize(
    "version", [b"cuda: str = '13", b"cuda = '13.0'\0", b"\xff\xfe"], ids=["cut", "zeros", "bytes"]
)
def test_torch_that_is_half_installed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: bytes
) -> None:
    """What an installation left that was broken off is no crash: it is tried out, and told then."""
    torch_for(tmp_path, "")
    (tmp_path / "torch" / "version.py").write_bytes(version)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert installed_torch() is None


def test_library_that_is_no_driver_is_told_with_the_cure(tmp_path: Path) -> None:
    """What goes by the driver's name and is something else, or of long ago, is told, and no crash."""
    folder = build_driver(tmp_path / "usr/local/nvidia/lib64")
    (folder / "none.c").write_text("int cuInit(unsigned flags) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "none.c"], check=True)
    with pytest.raises(DeviceError, match=r"is not whole.*lacks cuDriverGetVersion\); reinstall the driver"):
        find_device("cuda", tmp_path)


def test_this_torch_is_known_as_what_it_is() -> None:
    """The version file of the torch that the tests run with says what torch says when it is imported."""
    import torch

    build = installed_torch()
    assert build is not None
    assert (build.version, build.hip) == (str(torch.__version__), torch.version.hip or "")
    assert build.cuda == (torch.version.cuda and tuple(map(int, torch.version.cuda.split("."))))


@pytest.mark.parametrize(
    ("files", "distribution", "is_container"),
    [
        (
            {"etc/os-release": 'PRETTY_NAME="Ubuntu"\nID=ubuntu\nVERSION_ID="24.04"\n'},
            ("ubuntu", "24.04"),
            False,
        ),
        ({"usr/lib/os-release": "ID='debian'\nVERSION_ID=13\n", ".dockerenv": ""}, ("debian", "13"), True),
        ({"run/.containerenv": ""}, (None, None), True),
        ({"etc/os-release": 'NAME="D\udce9"\nID=debian\nVERSION_ID=12\n'}, ("debian", "12"), False),
    ],
)
def test_surroundings_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    distribution: tuple[str | None, str | None],
    is_container: bool,
) -> None:
    """The distribution is read from where it is written, and a container is known as one."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    here = surroundings(tmp_path)
    assert (here.os_release.get("ID"), here.os_release.get("VERSION_ID")) == distribution
    assert here.is_container == is_container
