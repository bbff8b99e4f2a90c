"""What a system with an NVIDIA GPU shows in /sys, /proc and /dev, in a folder."""

from __future__ import annotations

from pathlib import Path

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
)


GPU = ("0x10de", "0x030000")


def bus(root: Path, *devices: tuple[str, str]) -> Path:
    """A PCI bus with ``(vendor, class)`` devices below ``root``."""
    for number, (vendor, kind) in enumerate(devices):
        folder = root / "sys/bus/pci/devices" / f"0000:01:00.{number}"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    return root


def machine(root: Path, *nodes: str, driver: str | None = CLOSED) -> Path:
    """A machine with a GPU on its bus, its driver loaded, and some of its nodes."""
    bus(root, GPU)
    if driver is not None:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(driver)
    (root / "dev").mkdir()
    for name in nodes:
        (root / "dev" / name).touch()
    return root


ALL = ("nvidiactl", "nvidia0", "nvidia-uvm")
