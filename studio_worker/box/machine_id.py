"""Which machine this is: systemd's id of it, hashed, so that a disk can tell that it runs in another one.

No id is given where it would mean nothing: in a container for one program the image or the runtime makes one
up, and the volume with the state folder is what lasts.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from pathlib import Path

_APPLICATION = uuid.UUID("4896581c-7b77-469b-855a-a81b5dd8c12f").bytes
"""For this program alone: who reads a hash made with it learns nothing of what others make of the id."""

_WHOLE_SYSTEMS = {"lxc", "lxc-libvirt", "openvz", "systemd-nspawn"}
"""Containers that are kept and copied as machines are, by their names in systemd-detect-virt(1)."""

_ID = re.compile(r"[0-9a-f]{32}")


def machine_mark(root: Path = Path("/")) -> str | None:
    """This machine's mark, as sd_id128_get_machine_app_specific(3) makes it: by machine-id(5) the id itself
    is to be shown to nobody.

    ``None`` where systemd has not booted this system (sd_booted(3)), in a container for one program, and
    where the id is only this boot's (a mount over the file), has not been made yet, or cannot be read.
    """
    if not (root / "run/systemd/system").is_dir():
        return None
    if (container := _text(root / "run/systemd/container")) and container not in _WHOLE_SYSTEMS:
        return None
    machine = _text(root / "etc/machine-id")
    if not _ID.fullmatch(machine) or int(machine, 16) == 0 or _is_of_this_boot(root):
        return None
    digest = hmac.digest(bytes.fromhex(machine), _APPLICATION, hashlib.sha256)
    return uuid.UUID(bytes=digest[:16], version=4).hex


def _is_of_this_boot(root: Path) -> bool:
    """As systemd-machine-id-commit.service(8) tells: something is mounted there (proc_pid_mountinfo(5))."""
    mounts = (line.split() for line in _text(root / "proc/self/mountinfo").splitlines())
    return any(len(fields) > 4 and fields[4] == "/etc/machine-id" for fields in mounts)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
