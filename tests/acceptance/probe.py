"""Runs in the service's place, under its unit's limits: tells what can be opened, written and called there.

Takes the file to write its findings to, as one JSON object: what was tried, and ``ok`` or the error's name.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

WRITES = (
    "/", "/etc", "/etc/studio-worker", "/usr/lib/studio-worker", "/var", "/var/lib", "/var/tmp", "/tmp",
    "/run",
    "/home", "/root", "/sys/fs/cgroup", "/proc/sys/kernel", "/dev", "/dev/shm",
    "/var/lib/studio-worker", "/var/cache/studio-worker", "/run/studio-worker",
)  # fmt: skip
CLONE_NEWUSER = 0x10000000


def tried(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return "ok"


def write_into(folder: str) -> None:
    path = Path(folder, f"probe-{os.getpid()}")
    path.write_text("probe")
    path.unlink()


def open_device(path: str) -> None:
    os.close(os.open(path, os.O_RDWR))


def call(number: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) == -1:
        raise OSError(ctypes.get_errno(), "syscall")


def main() -> None:
    found = {f"write {folder}": tried(lambda folder=folder: write_into(folder)) for folder in WRITES}  # type: ignore[misc]
    for device in sorted(Path("/dev").glob("probe-*")):
        found[f"open {device}"] = tried(lambda device=device: open_device(str(device)))  # type: ignore[misc]
    families = {"AF_INET": socket.AF_INET, "AF_INET6": socket.AF_INET6, "AF_UNIX": socket.AF_UNIX}
    families |= {"AF_NETLINK": socket.AF_NETLINK, "AF_PACKET": socket.AF_PACKET}
    for name, family in families.items():
        kind = socket.SOCK_RAW if name in {"AF_NETLINK", "AF_PACKET"} else socket.SOCK_STREAM
        found[f"socket {name}"] = tried(lambda family=family, kind=kind: socket.socket(family, kind).close())  # type: ignore[misc]
    found["mknod"] = tried(lambda: os.mknod("/tmp/node", 0o20666, os.makedev(195, 0)))
    found["unshare user namespace"] = tried(lambda: call(272, CLONE_NEWUSER))
    found["chroot"] = tried(lambda: os.chroot("/"))
    found["setuid 0"] = tried(lambda: os.setuid(0))
    found["read the journal's sockets of others: /proc/1/environ"] = tried(
        lambda: Path("/proc/1/environ").read_bytes()
    )
    found["memory that is written and run"] = tried(
        lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    )
    found["read /proc/meminfo"] = tried(lambda: Path("/proc/meminfo").read_bytes())
    found["run a setuid program's privileges"] = (
        "ok" if "NoNewPrivs:\t0" in Path("/proc/self/status").read_text() else "EPERM"
    )
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
