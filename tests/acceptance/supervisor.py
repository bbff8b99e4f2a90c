"""Keeps one systemd-nspawn running, in a mount namespace that the caller has made for it (unshare(1)).

Takes one JSON object as its argument: ``root``, ``layers`` (the lowest last), ``changes``, ``scratch``,
``cgroup`` and ``command``. Ends with nspawn's exit status.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_REBOOT = 133
"""nspawn ends so under --keep-unit when the machine reboots, and wants to be started again."""


def mount(kind: str, where: str, options: str = "") -> None:
    command = ["mount", "-t", kind, kind, where]
    subprocess.run([*command, "-o", options] if options else command, check=True)


def main() -> int:
    wanted = json.loads(sys.argv[1])
    # Where this machine has its cgroups in the old layout, nspawn and the systemd in it get a pure new one.
    if (
        subprocess.run(["stat", "-fc", "%T", "/sys/fs/cgroup"], capture_output=True, text=True).stdout.strip()
        != "cgroup2fs"
    ):
        mount("cgroup2", "/sys/fs/cgroup")
    Path("/run/systemd").mkdir(exist_ok=True)
    mount("tmpfs", "/run/systemd", "mode=0755")  # nspawn leaves things there
    layers = ":".join(wanted["layers"])
    options = f"lowerdir={layers},upperdir={wanted['changes']},workdir={wanted['scratch']}"
    mount("overlay", wanted["root"], options)
    cgroup = Path("/sys/fs/cgroup", wanted["cgroup"])
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    while True:
        status = subprocess.run(
            ["setpriv", "--pdeathsig=KILL", *wanted["command"]], stdin=subprocess.DEVNULL
        ).returncode
        if status != _REBOOT:
            return status
        for folder in sorted(cgroup.rglob("*"), reverse=True):
            if folder.is_dir():
                folder.rmdir()


if __name__ == "__main__":
    sys.exit(main())
