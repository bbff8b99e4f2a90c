"""The device the pictures are made on: which one, how much memory. Imports no torch.

The device asked for is the device used: a GPU that is asked for and cannot be used is an error with its
cure, never a quiet fall back to the CPU. The driver is asked (driver.py), and whether it fits the torch that
is installed; torch itself is loaded when the first job comes. Whether torch can compute on it is tried out
before READY by :func:`probe`, in a process of its own.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.box.driver import find_driver, require_driver
from studio_worker.box.nodes import has_nvidia_gpu, no_gpu, wait_for_nodes
from studio_worker.box.ram import total_ram_bytes
from studio_worker.errors import DeviceError

PROBE_TIMEOUT_S = 180.0
"""Importing torch from a cold, slow disk takes a minute; a GPU that hangs takes for ever."""

DRIVER_LIMIT_S = 60.0
"""A driver that is being started answers after seconds; one whose GPU hangs never."""

_LOOK_AGAIN_S = 0.2


@dataclass(frozen=True)
class Device:
    """``name`` is torch's name (``cpu``, ``cuda:0``); ``memory_gb`` its whole memory in GB (1e9 bytes),
    ``capability`` a GPU's compute capability, ``(8, 9)`` for an RTX 40, and ``pci_bus_id`` its place on the
    bus, ``0000:41:00.0``, by which nvidia-smi and the kernel log know it; ``None`` on the CPU.
    """

    name: str
    description: str
    memory_gb: float
    capability: tuple[int, int] | None = None
    pci_bus_id: str | None = None

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


def find_device(setting: str, root: Path = Path("/"), *, limit_s: float = DRIVER_LIMIT_S) -> Device:
    """The device for ``[worker] device``: ``auto``, ``cuda``, ``cuda:N`` or ``cpu``.

    Args:
        limit_s: how long the driver may take to answer.

    Raises:
        DeviceError: the device cannot be used; the text names the cure.
    """
    if setting == "cpu":
        return Device("cpu", f"CPU, {os.cpu_count()} cores", total_ram_bytes() / 1e9)
    if setting == "auto" and not has_nvidia_gpu(root):
        raise DeviceError(no_gpu(root))
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", setting)
    if match is None:  # the configuration's own check comes first; this guards other callers
        raise DeviceError(f"unknown device {setting!r}; use auto, cuda, cuda:N or cpu")
    answers: queue.SimpleQueue[Device | Exception] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put(_find_gpu(int(match[1] or 0), root))
        except Exception as error:  # whatever it is, who asked gets it
            answers.put(error)

    # In a thread that nobody waits for: a call to a driver that hangs can be neither ended nor interrupted.
    threading.Thread(target=answer, name="driver", daemon=True).start()
    try:
        found = answers.get(timeout=limit_s)
    except queue.Empty:
        raise DeviceError(
            f"the NVIDIA driver did not answer within {limit_s:g} s; look for Xid errors in the kernel log "
            "(journalctl -k), and reboot the machine"
        ) from None
    if isinstance(found, Exception):
        raise found
    return found


def _find_gpu(index: int, root: Path) -> Device:
    driver = require_driver(root)
    driver.start()
    gpu = driver.gpu(index)
    driver.check_torch(gpu.capability)
    description = f"{gpu.name} at {gpu.pci_bus_id}"
    return Device(f"cuda:{index}", description, gpu.memory_bytes / 1e9, gpu.capability, gpu.pci_bus_id)


def wait_for_device(
    setting: str, *, on_wait: Callable[[list[str]], None], wait: Callable[[float], bool]
) -> bool:
    """Wait, for a bounded time, until the driver has made the nodes that the device of ``setting`` needs.

    Arguments and result as of :func:`wait_for_nodes`.
    """
    if setting == "cpu" or find_driver() is None:
        return True
    return wait_for_nodes(on_wait=on_wait, wait=wait)


def probe(
    name: str,
    *,
    compiles: bool = False,
    timeout_s: float = PROBE_TIMEOUT_S,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Have torch compute on the device ``name`` (``cpu``, ``cuda:0``), in a process that may hang or crash.

    Returns the facts that :mod:`studio_worker.engine.probe` lists; ``ok`` and ``error`` are always there.
    With ``stop`` set it gives up at once, with ``ok`` false.

    Args:
        compiles: whether torch must be able to compile for it, too.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "studio_worker.engine.probe", name, *(["--compile"] if compiles else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",  # a driver complains in whatever it likes
    )
    given_up_at = time.monotonic() + timeout_s
    while True:
        try:
            answer, complaints = process.communicate(timeout=_LOOK_AGAIN_S)
            break
        except subprocess.TimeoutExpired:
            was_stopped = stop is not None and stop.is_set()
            if not was_stopped and time.monotonic() < given_up_at:
                continue
        # Not waited for: a process that hangs in the driver cannot be killed before the driver lets it go.
        process.kill()
        error = (
            "stopped" if was_stopped else f"{name} did not answer within {timeout_s:g} s; reboot the machine"
        )
        return {"device": name, "ok": False, "error": error}
    lines = answer.splitlines()
    try:
        facts: dict[str, Any] = dict(json.loads(lines[-1] if lines else ""))
    except (TypeError, ValueError):
        last = (complaints.splitlines() or ["no message"])[-1][:300]
        how = f"exit status {process.returncode}: {last}"
        error = f"torch crashed on {name} ({how}); reinstall the driver and torch"
        return {"device": name, "ok": False, "error": error}
    return facts
