"""The device: which one is used, and what an operator is told where it cannot be.

The GPU alone is faked: by a driver library of our own that the dynamic linker finds first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from studio_worker.box.device import find_device, probe
from studio_worker.box.nodes import has_nvidia_gpu
from studio_worker.errors import DeviceError
from tests.fakes.driver import build_driver

ROOT = Path(__file__).parents[2]

ASK = """
import sys
from studio_worker.box.device import find_device
from studio_worker.errors import DeviceError
try:
    print(find_device(sys.argv[1]))
except DeviceError as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a libcuda.so.1 that says what the environment tells it to."""
    return build_driver(tmp_path_factory.mktemp("driver"))


def ask(
    driver: Path, setting: str, *, script: str = ASK, **environment: object
) -> subprocess.CompletedProcess[str]:
    told = {name.upper(): str(value) for name, value in environment.items()}
    return subprocess.run(
        [sys.executable, "-c", script, setting],
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(driver)} | told,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# --- the CPU ---


def test_cpu_is_used_where_it_is_asked_for() -> None:
    """device = "cpu" gives the CPU with the machine's memory."""
    device = find_device("cpu")
    assert (device.name, device.is_gpu) == ("cpu", False)
    assert device.memory_gb * 1e9 == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert "CPU" in device.description


def test_auto_without_a_gpu_is_an_error_that_names_the_cure() -> None:
    """A machine without GPU never falls back to the CPU by itself: the operator is told what to write."""
    if has_nvidia_gpu():
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(DeviceError, match='device = "cpu"') as caught:
        find_device("auto")
    assert caught.value.exit_status == 69


def test_unknown_device_is_refused() -> None:
    """A device name that means nothing is refused with the ones that mean something."""
    with pytest.raises(DeviceError, match="auto, cuda, cuda:N or cpu"):
        find_device("gpu")


# --- the driver ---


@pytest.mark.parametrize(
    ("setting", "name", "model", "memory", "place"),
    [
        ("cuda", "cuda:0", "Fake GPU A", "24.0", "0000:41:00.0"),
        ("cuda:0", "cuda:0", "Fake GPU A", "24.0", "0000:41:00.0"),
        ("cuda:1", "cuda:1", "Fake GPU B", "48.0", "0000:c1:00.0"),
    ],
)
def test_cuda_device_is_the_one_asked_for(
    driver: Path, setting: str, name: str, model: str, memory: str, place: str
) -> None:
    """cuda is the first GPU, cuda:N what nvidia-smi calls N, each with name, memory, place and kind."""
    done = ask(driver, setting, fake_count=2, fake_capability=75)
    told = f"Device(name={name!r}, description='{model} at {place}', memory_gb={memory}, capability=(7, 5), "
    assert done.stdout.strip() == f"{told}pci_bus_id={place!r})", done.stderr


def test_instance_finds_the_gpu_of_its_number(driver: Path) -> None:
    """With the environment of studio-worker@1 the second GPU is the only one, and is told by its place."""
    unit = (ROOT / "packaging" / "studio-worker@.service").read_text().replace("%i", "1")
    lines = re.findall(r"^Environment=(.*)$", unit, re.MULTILINE)
    environment = dict(word.split("=", 1) for line in lines for word in line.split())
    done = ask(driver, environment["STUDIO_WORKER_WORKER__DEVICE"], fake_count=2, **environment)
    assert "name='cuda:0', description='Fake GPU B at 0000:c1:00.0'" in done.stdout, done.stderr


def test_cuda_device_that_does_not_exist_is_refused(driver: Path) -> None:
    """A GPU number beyond the last is an error that says how many there are."""
    done = ask(driver, "cuda:2", fake_count=2)
    assert done.returncode == 69
    assert "this machine has 2" in done.stdout


@pytest.mark.parametrize(
    ("status", "cure"),
    [
        (100, "CUDA_VISIBLE_DEVICES"),
        (304, "/dev/nvidia"),
        (802, "fabric manager"),
        (803, "reboot"),
        (999, "nvidia-uvm"),
        (2, "nvidia-smi"),
        (777, "error 777"),
    ],
)
def test_unusable_driver_names_the_cure(driver: Path, status: int, cure: str) -> None:
    """A driver that does not start ends with status 69 and the cure for its error, never with the CPU."""
    done = ask(driver, "cuda", fake_init=status)
    assert done.returncode == 69
    assert cure in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_driver_that_hangs_is_told_within_its_limit(driver: Path) -> None:
    """A GPU that hangs holds nobody up, at its first call: whoever asks is told what to do, and ends."""
    script = ASK.replace("find_device(sys.argv[1])", "find_device(sys.argv[1], limit_s=0.5)")
    answer = ask(driver, "cuda", script=script, fake_count=1, fake_hang=1)
    assert answer.returncode == 69, answer.stderr
    assert answer.stdout.startswith("the NVIDIA driver did not answer within 0.5 s; ")
    assert "reboot" in answer.stdout


def test_gpu_that_cannot_be_opened_is_refused(driver: Path) -> None:
    """A GPU that is listed but cannot be opened is an error that names it."""
    done = ask(driver, "cuda:1", fake_count=2, fake_get=101)
    assert done.returncode == 69
    assert "cannot open cuda:1" in done.stdout


def test_missing_driver_library_names_the_cure(tmp_path: Path) -> None:
    """Without the driver's library the operator is told to install the driver."""
    (tmp_path / "libcuda.so.1").write_text("not a library")
    done = ask(tmp_path, "cuda")
    if done.returncode == 0:
        pytest.skip("the linker went on to the real driver of this machine")
    assert done.returncode == 69
    assert "install driver 580 or newer" in done.stdout


# --- is it usable ---


def test_probe_computes_on_the_device() -> None:
    """A device that torch can compute on is found usable, and torch's version is told."""
    facts = probe("cpu")
    assert (facts["ok"], facts["error"]) == (True, "")
    assert facts["torch"]


def test_probe_tells_why_a_gpu_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch cannot use is found before READY, with the cure in the sentence."""
    facts = probe("cuda:99")
    assert not facts["ok"]
    # By torch's build and the machine: the CPU's, a GPU, CUDA without a driver.
    cures = "studio-worker-torch-cuda", "there is no cuda:99", "check that nvidia-smi runs"
    assert any(cure in facts["error"] for cure in cures), facts["error"]


@pytest.mark.parametrize(
    ("torch_does", "says"),
    [
        ("import os; os.abort()", "crashed on cuda:0 .*reinstall"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.* reinstall"),
        ("import time; time.sleep(600)", "did not answer within 1 s; reboot"),
        (
            "import os; os.write(2, b'g\\xe9n\\xe9ral'); os._exit(3)",
            "crashed on cuda:0 .exit status 3.*reinstall",
        ),
        ("import os; print(12, flush=True); os._exit(0)", "crashed on cuda:0 .*reinstall"),
    ],
)
def test_probe_survives_a_torch_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_does: str, says: str
) -> None:
    """A torch that crashes, cannot be loaded, hangs in the driver or prints whatever it likes is a sentence
    with its cure.
    """
    (tmp_path / "torch.py").write_text(torch_does)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = probe("cuda:0", timeout_s=1.0 if "sleep" in torch_does else 60.0)
    assert not facts["ok"]
    assert re.search(says, facts["error"])


def test_probe_gives_up_when_the_service_stops() -> None:
    """A stop does not wait for a GPU that hangs."""
    stop = threading.Event()
    stop.set()
    assert not probe("cpu", stop=stop)["ok"]
