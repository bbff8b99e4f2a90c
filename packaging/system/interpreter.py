"""Debian 12's own Python as a folder of the package: ``interpreter.py check`` or ``copy FOLDER``.

It owns which of Debian's files the package carries, and refuses an interpreter that lacks fixes which the
archive has. The files are those of the installed packages, which dpkg has verified, and not of packages
fetched for the purpose: what compiles the byte code is then what is shipped, apt's own signatures hold, a
clean chroot has them by Build-Depends, and a build needs no network for them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libpython3.11-dev")
"""Interpreter, library in two parts, and the headers that torch.compile's compiler reads."""

PROFILE = "pkg.studio-worker.anyinterpreter"
"""The build profile that takes the installed one unchecked: to repeat an old build, or without apt."""

PLACES = {
    "/usr/bin/python3.11": "bin/python3.11",
    "/usr/lib/python3.11/": "lib/python3.11/",
    "/usr/include/x86_64-linux-gnu/python3.11/": "include/python3.11/",  # pyconfig.h alone
    "/usr/include/python3.11/": "include/python3.11/",
}
"""Where it goes, as CPython itself lays a prefix out; a file that is there already is not overwritten, for
/usr/include/python3.11/pyconfig.h only leads to the one of the architecture."""

LEFT_OUT = (
    # For the system's interpreter: its site customisation, and who may install into it.
    "sitecustomize.py",
    "EXTERNALLY-MANAGED",
    "LICENSE.txt",  # a link to the documentation, which the package has
    # Not for a service, and large.
    "config-3.11-",
    "pydoc_data/",
    "test/",
    "turtle.py",
    "lib-dynload/_test",
    "lib-dynload/_ctypes_test.",
    "lib-dynload/_xxtestfuzz.",
    "lib-dynload/xxlimited",
    # Nothing here uses them, and each would bind the package to one more library. Those of readline, nis and
    # dbm got other names with 64-bit time (Debian 13, Ubuntu 24.04); Berkeley DB is on its way out.
    "lib-dynload/readline.",
    "lib-dynload/nis.",
    "lib-dynload/_dbm.",
    "curses/",
    "lib-dynload/_curses",
    "crypt.py",
    "lib-dynload/_crypt.",
    "lib-dynload/ossaudiodev.",
)
"""Of the library, by the beginnings of their paths in it."""


def refusal() -> str | None:
    """Why the installed interpreter must not be shipped, with the cure; None where it may."""
    if PROFILE in os.environ.get("DEB_BUILD_PROFILES", "").split():
        return None
    cure = f"as root: apt-get update && apt-get install python3.11 {' '.join(PACKAGES)}"
    if "l=Debian-Security" not in _said("apt-cache", "policy"):
        return (
            "apt has no lists of Debian's security archive, so that nobody knows whether python3.11 lacks "
            f"fixes; {cure}\n(DEB_BUILD_PROFILES={PROFILE} builds without knowing)"
        )
    for package in PACKAGES:
        policy = _said("apt-cache", "policy", package)
        installed, candidate = (
            re.search(rf"^  {field}: (\S+)$", policy, re.MULTILINE) for field in ("Installed", "Candidate")
        )
        if installed is None or candidate is None or installed[1] == "(none)":
            return f"{package} is not installed; {cure}"
        if installed[1] != candidate[1]:
            return (
                f"{package} {installed[1]} is installed and Debian has {candidate[1]}: the package would "
                f"carry an interpreter without its fixes; {cure}\n"
                f"(DEB_BUILD_PROFILES={PROFILE} builds all the same)"
            )
    return None


def copy(folder: Path) -> None:
    """The interpreter into ``folder``.

    Raises:
        SystemExit: a file is not as its package has it.
    """
    changed = set(re.findall(r" (/usr/\S+)$", _said("dpkg", "--verify", *PACKAGES), re.MULTILINE))
    files = [
        line for line in _said("dpkg", "--listfiles", *PACKAGES).splitlines() if line.startswith("/usr/")
    ]
    # The architecture's pyconfig.h first: see PLACES.
    for source in sorted(set(files), key=lambda name: ("x86_64-linux-gnu" not in name, name)):
        target = _place(source, folder)
        if target is None or Path(source).is_dir() or target.exists():
            continue
        if source in changed:
            raise SystemExit(f"{source} is not as Debian's package has it; reinstall that package")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
        if target.suffix == ".py" and not target.is_symlink():
            target.chmod(0o644)  # some are commands as well; here nobody calls them
    (folder / "bin" / "python3").symlink_to("python3.11")


def _place(source: str, folder: Path) -> Path | None:
    """Where a file of Debian's goes; None where it is left out."""
    for begin, inside in PLACES.items():
        if source.startswith(begin):
            rest = source.removeprefix(begin)
            return None if rest.startswith(LEFT_OUT) else folder / f"{inside}{rest}"
    return None


def _said(*command: str) -> str:
    """What a command of apt or dpkg prints; its exit status says what was found, and is not an error."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False).stdout


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check"]:
            sys.exit(refusal())
        case ["copy", name]:
            copy(Path(name))
        case _:
            sys.exit("usage: interpreter.py check | copy FOLDER")
