"""The GPU of a running service: its figures, and what becomes of a service whose GPU is lost while it idles.

Faked is the driver alone, by libraries of our own that do what a test's file says: see fakes/nvml.py.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from studio_worker.appliance.gpu_watch import Eyes, GpuWatch, Judge, Look
from studio_worker.box.device import Device
from studio_worker.box.nodes import has_left_the_bus
from studio_worker.box.nvml import Nvml, NvmlError, Reading
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import DeviceError
from studio_worker.local_studio import LocalStudio
from studio_worker.report.control import ask
from studio_worker.report.snapshot import GpuFacts, Snapshot
from tests.fakes.driver import build_driver
from tests.fakes.nvml import build_nvml, tell
from tests.fakes.servers import FileServer, free_port
from tests.lab.service import READY_S, await_status, override, queue_synthetic, require, samples

PLACE = "0000:41:00.0"
CARD = Device("cuda:0", f"Fake GPU A at {PLACE}", 24.0, (8, 9), PLACE)
MODULE = "580.65.06"
FINE = Reading(MODULE, 40.0, 15.0, 0.0, 500_000_000, ())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the fake library reads."""
    path = tmp_path / "gpu"
    monkeypatch.setenv("FAKE_NVML", str(path))
    tell(path)
    return path


# --- figures ---


def test_figures_are_the_gpus(library: Path, told: Path) -> None:
    """Temperature, power, use and memory come in base units, and what keeps the clocks down by its cause."""
    tell(told, temperature=83, milliwatts=412_500, percent=97, used=22_000_000_000, reasons="0x64")
    assert Nvml(PLACE, str(library)).read() == Reading(MODULE, 83.0, 412.5, 0.97, 22_000_000_000, ("heat",))
    tell(told, reasons="0xC0")
    assert Nvml(PLACE, str(library)).read().slowed_by == ("heat", "power")
    tell(told, reasons="0x5")  # idle, and within its power limit
    assert Nvml(PLACE, str(library)).read().slowed_by == ()


@pytest.mark.parametrize("question", range(1, 6))
def test_figure_that_a_gpu_does_not_tell_is_missing_alone(library: Path, told: Path, question: int) -> None:
    """A card without a power sensor, or a part of one, tells the rest."""
    tell(told, untold=question)
    facts = Nvml(PLACE, str(library)).read()
    assert [value is None for value in facts[1:]] == [place == question for place in range(1, 6)]


@pytest.mark.parametrize("question", range(1, 6))
def test_sensor_that_is_broken_is_no_gpu_that_is_lost(library: Path, told: Path, question: int) -> None:
    """A card of which one figure alone is an "Unknown Error" tells the rest, and is not lost."""
    tell(told, broken=question)
    facts = Nvml(PLACE, str(library)).read()
    assert [value is None for value in facts[1:]] == [place == question for place in range(1, 6)]
    tell(told, ask=999)
    with pytest.raises(NvmlError, match="999"):
        Nvml(PLACE, str(library)).read()


def test_gpu_that_is_not_found_is_an_error_with_nvmls_words(library: Path, told: Path) -> None:
    """What NVML says is kept, with its number, to be looked up."""
    tell(told, find=999)
    with pytest.raises(NvmlError, match=r"Unknown Error \(NVML error 999\)"):
        Nvml(PLACE, str(library)).read()
    with pytest.raises(NvmlError, match=r"libnvidia-ml-none.so is not installed"):
        Nvml(PLACE, "libnvidia-ml-none.so").read()


def test_gpu_that_fell_off_the_bus_is_seen(tmp_path: Path) -> None:
    """A device whose place is empty, or that answers nothing but ones, has left the bus."""
    config = tmp_path / "sys/bus/pci/devices" / PLACE / "config"
    assert has_left_the_bus(PLACE, tmp_path)
    config.parent.mkdir(parents=True)
    config.write_bytes(b"\xde\x10\x84\x26" + bytes(60))
    assert not has_left_the_bus(PLACE, tmp_path)
    config.write_bytes(b"\xff" * 64)
    assert has_left_the_bus(PLACE, tmp_path)


# --- what is wrong ---


def look(
    answer: Reading | int | None = FINE,
    *,
    on_bus: bool = True,
    module: str | None = MODULE,
    library: str | None = MODULE,
) -> Look:
    """What is seen of a GPU; a number is NVML's error, ``None`` that nobody could ask."""
    told = answer if isinstance(answer, Reading) else NvmlError(f"NVML error {answer}", answer)
    return Look(told, on_bus, module, library)


@pytest.mark.parametrize(
    ("looks", "says"),
    [
        ([look(), look(15)], "GPU is lost: NVML error 15; .*Xid.*reboot"),
        ([look(), look(16)], "GPU is lost: NVML error 16; .*reboot"),
        ([look(15)], "GPU is lost"),
        ([look(), look(999), look(999)], "GPU is lost: NVML error 999"),
        ([look(12), look(12, on_bus=False)], "GPU is lost: it has left the PCI bus"),
        ([look(), look(999, on_bus=False)], "GPU is lost: it has left the PCI bus"),
        ([look(), None], "GPU is lost: its driver does not answer"),
        ([look(), look(library="590.44.01")], "module is 580.65.06 and its libraries are 590.44.01.*reboot"),
        ([look(12), look(12, library="590.44.01")], "its libraries are 590.44.01.*reboot"),
        ([look(), look(module="590.44.01", library="590.44.01")], "replaced .* 580.65.06 by 590.44.01"),
    ],
)
def test_gpu_that_cannot_be_used_any_more_is_told_with_the_cure(looks: list[Look | None], says: str) -> None:
    """A GPU that is lost and a driver that was replaced are told from what worked before."""
    judge = Judge()
    *before, last = [judge.problem(each) for each in looks]
    assert before == [None] * len(before)
    assert last is not None
    assert re.search(says, last), last


@pytest.mark.parametrize(
    "looks",
    [
        [look(), look(999), look(), look(999), look()],
        [look(12), look(12), look(12)],
        [look(999), look(999), look(999)],
        [look(18), look(18)],
        [None, None, look(999), None],
        [look(12, on_bus=False), look(12, on_bus=False)],
        [look(), look(on_bus=False), look(on_bus=False)],
        [look(library="575.51.03"), look(library="575.51.03")],
        [look(module=None, library="1.1"), look(module="537.13", library="1.1")],
        [look(), look(library=None), look(module=None), look()],
        [look(), *4 * [look(None)], look()],
    ],
    ids=[
        "an error that passes",
        "no NVML",
        "an NVML that never worked",
        "an NVML of another version",
        "an NVML that hangs from the start",
        "a bus that is hidden in a container",
        "a GPU that answers, whatever its place on the bus shows",
        "a compatibility library",
        "a module whose version shows late",
        "a driver that is being replaced",
        "a process that could not ask for a while",
    ],
)
def test_machine_that_is_odd_from_the_start_goes_on(looks: list[Look | None]) -> None:
    """The GPU has computed before READY: what is odd since then, or passes, does not end a service."""
    judge = Judge()
    assert [judge.problem(each) for each in looks] == [None] * len(looks)


# --- the watch ---


@dataclass
class Watched:
    """A watch that looks every moment, and what it said and did."""

    said: queue.SimpleQueue[str]
    ended: queue.SimpleQueue[DeviceError]
    is_idle: threading.Event
    watch: GpuWatch


@contextmanager
def watched(library: Path, *, limit_s: float) -> Iterator[Watched]:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    ended: queue.SimpleQueue[DeviceError] = queue.SimpleQueue()
    is_idle = threading.Event()
    watch = GpuWatch(
        CARD,
        is_idle=is_idle.is_set,
        say=said.put,
        end=ended.put,
        eyes=Eyes(PLACE, Nvml(PLACE, str(library)), limit_s=limit_s),
        every_s=0.01,
    )
    watch.start()
    try:
        yield Watched(said, ended, is_idle, watch)
    finally:
        watch.stop()


def await_figures(watch: GpuWatch, *, are_there: bool) -> None:
    while (watch.facts is not None) != are_there:  # pytest's own limit ends it
        threading.Event().wait(0.005)


def test_driver_that_hangs_does_not_hang_the_watch(library: Path, told: Path) -> None:
    """A driver that no longer answers is told within the limit, and ends an idle service."""
    with watched(library, limit_s=0.3) as found:
        found.is_idle.set()
        await_figures(found.watch, are_there=True)
        tell(told, hang=1)
        error = found.ended.get(timeout=60)
        tell(told)
    assert found.watch.facts is None
    assert "cuda:0, Fake GPU A at 0000:41:00.0: the GPU is lost: its driver does not answer" in str(error)
    assert error.exit_status == 69


def test_job_in_hand_is_left_alone(library: Path, told: Path) -> None:
    """While a job is in hand the watch only says what it sees; the service ends after it."""
    with watched(library, limit_s=60) as found:
        await_figures(found.watch, are_there=True)
        tell(told, ask=15)
        assert "the GPU is lost: GPU is lost" in found.said.get(timeout=60)
        assert found.ended.empty()
        found.is_idle.set()
        found.ended.get(timeout=60)


def test_trouble_that_passes_is_taken_back(library: Path, told: Path) -> None:
    """A driver that answers again before the job is over has nothing said of it, and nothing ends."""
    with watched(library, limit_s=0.3) as found:
        await_figures(found.watch, are_there=True)
        tell(told, hang=1)
        assert found.said.get(timeout=60)
        tell(told)
        assert found.said.get(timeout=60) == ""
        found.is_idle.set()
        await_figures(found.watch, are_there=True)
    assert found.ended.empty()


@pytest.mark.parametrize("trouble", ["threads", "descriptors"])
def test_process_that_is_short_itself_has_not_lost_its_gpu(
    library: Path, told: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Without a thread or a descriptor to look with there are no figures for a while, and that is all."""
    with watched(library, limit_s=0.3) as found, monkeypatch.context() as patch:
        found.is_idle.set()
        await_figures(found.watch, are_there=True)
        if trouble == "threads":
            patch.setattr(threading.Thread, "start", _fails(RuntimeError("can't start new thread")))
        else:
            patch.setattr(Nvml, "read", _fails(OSError(errno.EMFILE, "Too many open files")))
        await_figures(found.watch, are_there=False)
        assert found.ended.empty()
        patch.undo()
        await_figures(found.watch, are_there=True)
        assert found.ended.empty()


def _fails(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


# --- the whole service ---

FAKE_TORCH = """
import json, os, sys
if "studio_worker.engine.probe" in sys.orig_argv:
    facts = {"device": sys.argv[-1], "ok": True, "error": "", "torch": "2.13.0+cu130"}
    print(json.dumps(facts), flush=True)
    os._exit(0)
raise ImportError("this torch computes nothing")
"""


@dataclass
class GpuBox:
    """The environment of a service on a box with one GPU, whose driver a test may change."""

    environment: dict[str, str]
    told: Path
    folder: Path

    def replace_driver(self, version: str) -> None:
        """Other libraries come in place of the installed ones, as by an upgrade; the module stays loaded."""
        link = self.folder / "libcuda.so.1"
        old, new = link.resolve(), self.folder / f"libcuda.so.{version}"
        shutil.copy(old, new)
        (self.folder / "new").symlink_to(new.name)
        (self.folder / "new").replace(link)
        old.unlink()


@pytest.fixture
def gpu_box(site: Path, tmp_path: Path, library: Path, told: Path) -> GpuBox:
    """A GPU by a fake driver, and a torch that the probe finds able to compute on it; jobs need no torch."""
    folder = build_driver(tmp_path / "driver", MODULE)
    (folder / library.name).symlink_to(library)
    torch = tmp_path / "python" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text(FAKE_TORCH)
    (torch / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: str = '13.0'\n")
    paths = [str(torch.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
        "FAKE_COUNT": "1",
        "FAKE_NVML": str(told),
    }
    return GpuBox(environment, told, folder)


def assert_ended(running: ServiceProcess, says: str) -> None:
    """The service ended by itself with 69; STATUS told why, up to the end, and so does its last line."""
    running.await_message("STOPPING=1", READY_S)
    assert running.wait() == 69
    told = [line.removeprefix("STATUS=") for line in running.messages if line.startswith("STATUS=")]
    assert any(re.search(f"^ready.*{says}", line) for line in told), told
    assert re.search(says, told[-1]), told
    last = running.log_lines()[-1]
    assert (last["message"], last["exit_status"]) == ("service ends with an error", 69)
    assert re.search(says, last["error"])


@pytest.mark.welcoming_studio
def test_gpu_lost_by_an_idle_service_ends_it(
    site: Path, studio: LocalStudio, tmp_path: Path, gpu_box: GpuBox
) -> None:
    """A GPU that falls off the bus while no job runs: said in STATUS, exit status 69."""
    override(site, '[worker]\ndevice = "cuda"\n')
    with ServiceProcess(site, tmp_path / "log", gpu_box.environment) as running:
        running.await_message("STATUS=ready, connected", READY_S)
        await_status(studio, queue_synthetic(studio), "done")
        tell(gpu_box.told, ask=15)
        assert_ended(running, "the GPU is lost: GPU is lost .NVML error 15.; look for Xid errors")


def test_gpu_lost_while_models_are_downloaded_is_never_ready(
    site: Path, tmp_path: Path, gpu_box: GpuBox
) -> None:
    """READY is not said of a GPU that was lost after it was tried out: STATUS says so, exit status 69."""
    override(site, '[worker]\ndevice = "cuda"\n')
    with FileServer() as server:
        held = server.serve("/held.safetensors", b"held" * 1000, hold_after=100)
        require(site, "large", held)
        with ServiceProcess(site, tmp_path / "log", gpu_box.environment) as running:
            assert held.held.wait(READY_S)
            await_gpu(tmp_path)
            tell(gpu_box.told, find=999)
            running.await_message("STATUS=the GPU is lost: Unknown Error", READY_S)
            assert running.wait() == 69
            held.release()
    assert not any(line.startswith("READY") for line in running.messages)
    assert "the GPU is lost: Unknown Error" in running.log_lines()[-1]["error"]


@pytest.mark.welcoming_studio
def test_driver_replaced_under_an_idle_service_ends_it(site: Path, tmp_path: Path, gpu_box: GpuBox) -> None:
    """An upgrade of the driver under a running service: told in STATUS with both versions, exit status 69."""
    override(site, '[worker]\ndevice = "cuda"\n')
    with ServiceProcess(site, tmp_path / "log", gpu_box.environment) as running:
        running.await_message("READY=1", READY_S)
        await_gpu(tmp_path)
        gpu_box.replace_driver("590.44.01")
        assert_ended(running, "kernel module is 580.65.06 and its libraries are 590.44.01.*; reboot")


def await_gpu(tmp_path: Path) -> Snapshot:
    """What status says once the GPU has been looked at."""
    while True:  # pytest's own limit ends it
        now = Snapshot.model_validate(ask(tmp_path / "work" / "run", "status"))
        if now.device.gpu is not None:
            return now
        threading.Event().wait(0.02)


@pytest.mark.welcoming_studio
def test_running_service_tells_the_gpus_figures(site: Path, tmp_path: Path, gpu_box: GpuBox) -> None:
    """status, status --json and the metrics have temperature, power, use and memory of the service's GPU."""
    port = free_port()
    override(site, f'[worker]\ndevice = "cuda"\n[metrics]\nlisten = "127.0.0.1:{port}"\n')
    tell(gpu_box.told, temperature=71, milliwatts=305_000, percent=98, used=20_000_000_000, reasons="0x40")
    with ServiceProcess(site, tmp_path / "log", gpu_box.environment) as running:
        running.await_message("READY=1", READY_S)
        facts = await_gpu(tmp_path).device.gpu
        command = [sys.executable, "-m", "studio_worker", "status", "--config", str(site)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            found = samples(answer.read().decode())
        assert running.stop() == 0
    assert facts == GpuFacts(
        pci_bus_id=PLACE,
        temperature_celsius=71.0,
        power_watts=305.0,
        utilization_ratio=0.98,
        used_bytes=20_000_000_000,
        slowed_by=("heat",),
    )
    assert "Fake GPU A at 0000:41:00.0" in shown
    assert "71 °C, 305 W, in use 98 % of the time, slowed by heat" in shown
    assert (
        found.items()
        >= {
            f"studio_worker_gpu_temperature_celsius pci_bus_id={PLACE}": 71,
            f"studio_worker_gpu_power_watts pci_bus_id={PLACE}": 305,
            f"studio_worker_gpu_utilization_ratio pci_bus_id={PLACE}": 0.98,
            f"studio_worker_gpu_memory_used_bytes pci_bus_id={PLACE}": 2e10,
            "studio_worker_gpu_slowed cause=heat": 1,
            "studio_worker_gpu_slowed cause=power": 0,
        }.items()
    )
