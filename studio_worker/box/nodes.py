"""What the system shows of an NVIDIA GPU: on the bus, under /dev, of its driver; and what is wrong there.

Reads /sys, /proc and /dev and touches no library, so it can say what is missing where CUDA only says no.
After a boot the device nodes may come seconds after the service; :func:`wait_for_nodes` waits for them.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from studio_worker.wording import user

log = logging.getLogger(__name__)

WAIT_S = 30.0
"""A driver that is loaded at boot takes some seconds to make its nodes; one that is not never does."""

_LOOK_EVERY_S = 0.25

_NVIDIA_VENDOR = "0x10de"
_OTHER_VENDORS = {"0x1002": "AMD", "0x8086": "Intel"}
"""PCI vendor ids (pci.ids): ours, and of those whose GPUs are taken for one of ours."""

_ANY_GPU = "nvidia0"
_NODES = ("nvidiactl", _ANY_GPU, "nvidia-uvm")
"""What CUDA opens (NVIDIA's driver README, "device files"); any ``nvidiaN`` counts for the second."""


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether the driver or the PCI bus below ``root`` shows an NVIDIA display device (class 0x03….)."""
    return _gpu_nodes(root) != [] or module_version(root) is not None or _is_on_bus(root)


def other_gpus(root: Path = Path("/")) -> list[str]:
    """The makers of the other GPUs on the bus, those that torch has builds for."""
    vendors = {_display_vendor(device) for device in (root / "sys/bus/pci/devices").glob("*")}
    return sorted(name for vendor, name in _OTHER_VENDORS.items() if vendor in vendors)


def no_gpu(root: Path = Path("/")) -> str:
    """What a machine without an NVIDIA GPU is told, with what can be done."""
    others = other_gpus(root)
    found = f"a GPU of {' and one of '.join(others)}, which is not supported, and " if others else ""
    return (
        f"this machine shows {found}no NVIDIA GPU; to make pictures on the CPU (slow), write "
        'device = "cpu" under [worker] in the configuration'
    )


def module_version(root: Path = Path("/")) -> str | None:
    """The version of the driver's loaded kernel module, e.g. ``550.163.01``; empty where it does not say."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue …
    # NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build …
    match = re.search(r"Kernel Module\D.*?\s(\d+\.\d+(?:\.\d+)?)\s", f"{text}\n")
    return match[1] if match else ""


def library_path(maps: str | None = None) -> Path | None:
    """The file of the ``libcuda`` that this process has loaded, also where another has replaced it since
    (proc_pid_maps(5)).
    """
    text = Path("/proc/self/maps").read_text(errors="replace") if maps is None else maps
    found = next((line for line in text.splitlines() if "/libcuda.so" in line), None)
    return None if found is None else Path(found[found.index("/") :].removesuffix(" (deleted)"))


def library_version(maps: str | None = None) -> str | None:
    """The version of the ``libcuda`` that this process has loaded, by its file's name."""
    path = library_path(maps)
    return None if path is None else _version_of(path)


def installed_version() -> str | None:
    """The version of the ``libcuda`` that another process would load now from where this one has its own."""
    try:
        path = library_path()
        return None if path is None else _version_of(path.with_name("libcuda.so.1").resolve())
    except OSError:  # no descriptor is free, say: nothing is known
        return None


def _version_of(library: Path) -> str | None:
    match = re.fullmatch(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)", library.name)
    return match[1] if match else None


def missing_nodes(root: Path = Path("/")) -> list[str]:
    """The device nodes that CUDA needs and that are not there."""
    missing = [name for name in _NODES if not (root / "dev" / name).exists()]
    if _gpu_nodes(root):
        missing = [name for name in missing if name != _ANY_GPU]
    return [f"/dev/{name}" for name in missing]


def wait_for_nodes(
    root: Path = Path("/"),
    *,
    on_wait: Callable[[list[str]], None],
    wait: Callable[[float], bool],
    limit_s: float = WAIT_S,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Wait, where the system shows an NVIDIA GPU, until its nodes are there or the limit has passed.

    Args:
        on_wait: called with what is missing, each time that changes.
        wait: waits for so many seconds; returns whether the service was asked to stop meanwhile.

    Returns:
        False where the service was asked to stop.
    """
    if not has_nvidia_gpu(root):
        return True
    began = clock()
    said: list[str] = []
    while missing := missing_nodes(root):
        if clock() - began >= limit_s:
            log.error("device nodes did not come", extra={"op": "device", "missing": missing})
            break
        if missing != said:
            said = missing
            on_wait(missing)
            log.info("waiting for device nodes", extra={"op": "device", "missing": missing})
        if wait(_LOOK_EVERY_S):
            return False
    return True


def driver_problem(root: Path = Path("/"), library: str | None = None) -> str | None:
    """What keeps CUDA from working, with its cure in one sentence; ``None`` where nothing is seen.

    Args:
        library: the version of the driver's library, where known.
    """
    if not has_nvidia_gpu(root):
        return None
    module = module_version(root)
    if module is None and _is_on_bus(root):
        return (
            "the NVIDIA driver's kernel module is not loaded; run `modprobe nvidia`, and where that fails "
            "(a new kernel, most often) reinstall the driver, then reboot"
        )
    if module and library and module != library:
        return versions_apart(module, library)
    missing = missing_nodes(root)
    if missing == ["/dev/nvidia-uvm"]:
        return "/dev/nvidia-uvm is missing; run `modprobe nvidia-uvm` (the package has it loaded at boot)"
    if missing:
        are = "are" if missing[1:] else "is"
        return (
            f"{' and '.join(missing)} {are} missing; run `nvidia-modprobe -c 0 -u` "
            "or start nvidia-persistenced, which makes them"
        )
    if closed := next((node for node in _existing_nodes(root) if not _may_open(root / node)), None):
        return (
            f"user {user()} may not open /{closed}; add it to the groups video and render "
            "(`usermod -aG video,render NAME`), see the unit's DeviceAllow=, and restart the service"
        )
    return None


def versions_apart(module: str, library: str) -> str:
    """What is to be said where the driver's two halves are of these versions, with the cure."""
    return (
        f"the NVIDIA driver's kernel module is {module} and its libraries are {library}: it was "
        "upgraded while the old one is still loaded; reboot"
    )


def has_left_the_bus(pci_bus_id: str, root: Path = Path("/")) -> bool:
    """Whether a device that was on the bus is no longer there, or answers nothing but ones, as one does that
    has fallen off (lspci shows it as ``rev ff``).
    """
    try:
        head = (root / "sys/bus/pci/devices" / pci_bus_id / "config").read_bytes()[:4]
    except FileNotFoundError:
        return True
    except OSError:  # not for us to see
        return False
    return head == b"\xff\xff\xff\xff"


def _gpu_nodes(root: Path) -> list[str]:
    found = (path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    return sorted(f"dev/{name}" for name in found if name[len("nvidia") :].isdecimal())


def _existing_nodes(root: Path) -> list[str]:
    return ["dev/nvidiactl", *_gpu_nodes(root), "dev/nvidia-uvm"]


def _may_open(path: Path) -> bool:
    # Opened, not asked with access(2): the unit's device rules show only here.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in {errno.EACCES, errno.EPERM}
    return True


def _is_on_bus(root: Path) -> bool:
    devices = (root / "sys/bus/pci/devices").glob("*")
    return any(_display_vendor(device) == _NVIDIA_VENDOR for device in devices)


def _display_vendor(device: Path) -> str | None:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:  # it left the bus between the listing and the reading
        return None
    # A graphics card's sound function has the same vendor and comes as a device of its own.
    return vendor if kind.startswith("0x03") else None
