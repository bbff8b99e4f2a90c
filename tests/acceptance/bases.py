"""The base systems that machines boot: a bare one of each suite, made once and kept in the cache.

No base has a python3, nor anything else that a package of ours must bring along or depend on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("STUDIO_WORKER_TEST_CACHE", "/var/cache/studio-worker-test"))
BUILT_ON = "bookworm"
"""The suite that the packages are built on: what is said of the packages alone is checked there, once."""
SUITE = os.environ.get("STUDIO_WORKER_TEST_SUITE", BUILT_ON)
"""The suite that is booted."""

_PACKAGES = (
    "ca-certificates",
    "dbus",
    "libnss-systemd",
    "libpam-systemd",
    "procps",
    "systemd",
    "systemd-sysv",
)
"""Init, and what a check calls."""
_LIBRARIES = ("libexpat1", "libffi8", "libsqlite3-0")
"""Those of the package's libraries that not every Debian holds: it is installed without network."""
_QUIET_UNITS = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
)
"""Nothing wakes up by itself while something is measured."""
_OPTIONS = {
    # Debian dates the index of what is not released yet, and mirrors may be weeks behind.
    "forky": ['--aptopt=Acquire::Check-Valid-Until "false"'],
}


def base_system(suite: str = SUITE) -> Path:
    """The folder with the suite's base system; made once, in half a minute to three, then taken from
    the cache.
    """
    what = (3, suite, _included(suite), _QUIET_UNITS, _OPTIONS.get(suite))
    base = CACHE / f"base-{suite}-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"lock-{suite}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not base.is_dir():
            for old in CACHE.glob(f"base-{suite}-*"):
                shutil.rmtree(old)
            _make_base(suite, base)
    return base


def _included(suite: str) -> tuple[str, ...]:
    if suite == "bullseye":  # only the units are started there
        return _PACKAGES
    return tuple(sorted(_PACKAGES + _LIBRARIES))


def _make_base(suite: str, base: Path) -> None:
    part = base.with_suffix(".part")
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(_included(suite))}"]
    command += ["--dpkgopt=force-unsafe-io", *_OPTIONS.get(suite, []), suite, str(part)]
    subprocess.run(command, check=True)
    (part / "etc/machine-id").write_text("")  # made at each boot
    (part / "etc/hostname").write_text("box\n")
    (part / "var/log/journal").mkdir(exist_ok=True)  # the journal survives a reboot
    for unit in _QUIET_UNITS:
        (part / "etc/systemd/system" / unit).symlink_to("/dev/null")
    shutil.rmtree(part / "dev")
    (part / "dev").mkdir()
    part.rename(base)
