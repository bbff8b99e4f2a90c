"""What the system shows of a GPU, what is wrong there, and the wait for its nodes after a boot.

The machine alone is faked: a folder that looks like /sys, /proc and /dev.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from studio_worker.box.nodes import (
    driver_problem,
    has_nvidia_gpu,
    library_version,
    missing_nodes,
    module_version,
    wait_for_nodes,
)
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.report.control import ask
from studio_worker.report.snapshot import Snapshot
from tests.fakes.system_files import ALL, CLOSED, OPEN, bus, machine
from tests.lab.nobody import open_above, told_to_nobody
from tests.lab.service import READY_S

ROOT = Path(__file__).parents[2]


# --- is there a GPU ---


def test_gpu_is_seen_behind_its_sound_function(tmp_path: Path) -> None:
    """A graphics card is found although its sound function stands on the bus before it."""
    assert has_nvidia_gpu(
        bus(tmp_path, ("0x8086", "0x060000"), ("0x10de", "0x040300"), ("0x10de", "0x030000"))
    )


def test_gpu_without_a_display_output_is_seen(tmp_path: Path) -> None:
    """A data centre card (3D controller, no output) counts as a GPU."""
    assert has_nvidia_gpu(bus(tmp_path, ("0x10de", "0x030200")))


@pytest.mark.parametrize("device", [("0x1002", "0x030000"), ("0x10de", "0x020000")])
def test_other_cards_are_no_gpu(tmp_path: Path, device: tuple[str, str]) -> None:
    """Another maker's display, or NVIDIA's network card, is no GPU for us."""
    assert not has_nvidia_gpu(bus(tmp_path, device))


def test_machine_without_a_pci_bus_has_no_gpu(tmp_path: Path) -> None:
    """A machine without PCI bus is one without GPU, not an error."""
    assert not has_nvidia_gpu(tmp_path)


def test_card_that_leaves_the_bus_is_passed_over(tmp_path: Path) -> None:
    """A device whose files vanish while they are read does not end the service."""
    bus(tmp_path, ("0x10de", "0x030000"))
    (tmp_path / "sys/bus/pci/devices/0000:01:00.0/class").unlink()
    assert not has_nvidia_gpu(tmp_path)


@pytest.mark.parametrize("trace", ["dev/nvidia0", "proc/driver/nvidia/version"])
def test_loaded_driver_counts_as_a_gpu(tmp_path: Path, trace: str) -> None:
    """In a container that shows no bus, the driver's own traces tell of the GPU."""
    (tmp_path / trace).parent.mkdir(parents=True)
    (tmp_path / trace).touch()
    assert has_nvidia_gpu(tmp_path)


def test_second_gpu_alone_is_a_gpu(tmp_path: Path) -> None:
    """A container that is given the second GPU only has one all the same, with nothing missing."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidiactl", "nvidia1", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert has_nvidia_gpu(tmp_path)
    assert missing_nodes(tmp_path) == []


# --- versions ---


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "535.183.01"), (OPEN, "570.86.15"), ("?", "")])
def test_version_of_the_kernel_module_is_read(tmp_path: Path, text: str, version: str) -> None:
    """Both kinds of NVIDIA's kernel module say their version; a new wording is no crash."""
    assert module_version(machine(tmp_path, driver=text)) == version


def test_version_of_the_library_is_that_of_its_file() -> None:
    """The loaded libcuda is known by the file behind its name; without one there is no version."""
    line = "7f00-7f01 r-xp 00000000 08:01 123    /usr/lib/nvidia/current/libcuda.so.550.163.01"
    assert library_version(f"{line}\nother\n") == "550.163.01"
    assert library_version(f"{line} (deleted)\n") == "550.163.01"  # replaced since
    assert library_version(f"{line.replace('current', 'a folder')}\n") == "550.163.01"
    assert library_version("7f00-7f01 r-xp 00000000 08:01 123    /lib/libc.so.6\n") is None


# --- what is wrong ---


def test_machine_in_order_has_no_problem(tmp_path: Path) -> None:
    """All nodes there, one version: nothing is complained of; nor on a machine without GPU."""
    assert driver_problem(machine(tmp_path, *ALL), "535.183.01") is None
    assert driver_problem(tmp_path / "elsewhere", "535.183.01") is None


@pytest.mark.parametrize(
    ("nodes", "driver", "library", "problem", "cure"),
    [
        ((), None, None, "kernel module is not loaded", "modprobe nvidia"),
        (ALL, CLOSED, "550.163.01", "module is 535.183.01 and its libraries are 550.163.01", "reboot"),
        (("nvidiactl", "nvidia0"), CLOSED, None, "/dev/nvidia-uvm is missing", "modprobe nvidia-uvm"),
        (("nvidia-uvm",), CLOSED, None, "/dev/nvidiactl and /dev/nvidia0 are missing", "nvidia-modprobe"),
    ],
)
def test_problem_of_the_driver_names_its_cure(
    tmp_path: Path, nodes: tuple[str, ...], driver: str | None, library: str | None, problem: str, cure: str
) -> None:
    """Module not loaded, versions apart, nodes missing: each is told in one line with what helps."""
    said = driver_problem(machine(tmp_path, *nodes, driver=driver), library)
    assert said is not None
    assert problem in said
    assert cure in said
    assert len(said.splitlines()) == 1


def test_node_that_may_not_be_opened_names_user_and_groups(tmp_path: Path) -> None:
    """A node closed to the service's user is told with the groups that open it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    machine(tmp_path, *ALL)
    for name in ALL:
        (tmp_path / "dev" / name).chmod(0o660)
    open_above(tmp_path)
    said = told_to_nobody(lambda: driver_problem(tmp_path) or "nothing")
    assert "may not open /dev/nvidiactl" in said
    assert "video and render" in said


# --- the wait ---


class Boot:
    """Time that passes only while somebody waits; nodes come at their second."""

    def __init__(self, root: Path, **coming: float) -> None:
        self.root, self.coming, self.now = root, coming, 0.0
        self.said: list[list[str]] = []
        self.stop_at = float("inf")

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        for name, at in self.coming.items():
            if self.now >= at:
                (self.root / "dev" / name.replace("_", "-")).touch()
        return self.now >= self.stop_at

    def run(self) -> bool:
        return wait_for_nodes(self.root, on_wait=self.said.append, wait=self.wait, clock=lambda: self.now)


def test_nodes_that_come_late_are_waited_for(tmp_path: Path) -> None:
    """A driver still loading at boot: the start goes on as soon as the last node is there."""
    boot = Boot(machine(tmp_path, driver=None), nvidiactl=3.0, nvidia0=3.0, nvidia_uvm=7.0)
    assert boot.run()
    assert boot.now == 7.0
    assert boot.said == [["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm"], ["/dev/nvidia-uvm"]]


def test_wait_for_nodes_is_bounded(tmp_path: Path) -> None:
    """Nodes that never come are waited for half a minute, not for ever; the device's own error follows."""
    boot = Boot(machine(tmp_path, "nvidiactl", "nvidia0"))
    assert boot.run()
    assert boot.now == 30.0


def test_wait_for_nodes_ends_with_a_stop(tmp_path: Path) -> None:
    """A stop during the wait is heard at once."""
    boot = Boot(machine(tmp_path))
    boot.stop_at = 2.0
    assert not boot.run()
    assert boot.now == 2.0


@pytest.mark.parametrize("nodes", [ALL, None])
def test_machine_in_order_or_without_gpu_waits_for_nothing(
    tmp_path: Path, nodes: tuple[str, ...] | None
) -> None:
    """Where all nodes are there, or the machine has no GPU to wait for, the start is not held up."""
    boot = Boot(machine(tmp_path, *nodes) if nodes else tmp_path)
    assert boot.run()
    assert (boot.now, boot.said) == (0.0, [])


def test_service_tells_systemd_what_it_waits_for(tmp_path: Path) -> None:
    """STATUS names the missing nodes, and so does `status`; more time is asked for once, and SIGTERM ends the
    wait with 0.
    """
    machine(tmp_path / "machine", "nvidiactl", "nvidia0")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import functools, pathlib\n"
        "import studio_worker.box.device as device\n"
        "device.find_driver = lambda: object()\n"
        f"root = pathlib.Path({str(tmp_path / 'machine')!r})\n"
        "device.wait_for_nodes = functools.partial(device.wait_for_nodes, root)\n"
    )
    (tmp_path / "config.toml").write_text(
        f'[worker]\ndevice = "cuda"\n[state]\ndir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n'
        f'[models]\nroot = "{tmp_path}/models"\n'
    )
    with ServiceProcess(tmp_path, tmp_path / "log", {"PYTHONPATH": f"{tmp_path}/site:{ROOT}"}) as running:
        running.await_message("EXTEND_TIMEOUT_USEC=", READY_S)
        answer = Snapshot.model_validate(ask(tmp_path / "run", "status"))
        assert (answer.phase, answer.status) == ("starting", "waiting for /dev/nvidia-uvm")
        assert answer.process.starts == 1
        running.signal(signal.SIGTERM)
        assert running.wait(READY_S) == 0
    assert "STATUS=waiting for /dev/nvidia-uvm" in running.messages
