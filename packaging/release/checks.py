"""What speaks against a release, asked before anything is built: tree, versions, changelogs, locks, key."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "packaging" / "lock"


def output(*command: str | Path) -> str:
    """What a command prints; its complaints go to the terminal."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def faults(version: str, key: str | None, *, unsigned: bool) -> Iterator[str]:
    """Whatever speaks against releasing this tree as ``version``, each with its cure."""
    if changed := output("git", "status", "--porcelain"):
        yield f"the tree is not clean; commit or remove:\n{changed}"
    tag = f"v{version}"
    if output("git", "tag", "--list", tag) and output("git", "rev-list", "-1", tag) != head():
        yield f"{tag} is the name of another commit: a change needs a new version"
    yield from _of_versions(version)
    yield from _of_locks()
    if key is None and not unsigned:
        yield "no key is given to sign with: KEY=FINGERPRINT, or UNSIGNED=1 to go on without a signature"
    if key is not None and (why := unable_to_sign(key)):
        yield f"{key} cannot sign: {why}"


def unable_to_sign(key: str) -> str | None:
    """Why a key signs nothing, for one that is there may have run out or be locked; None: it does sign."""
    command = ["gpg", "--batch", "--local-user", key, "--armor", "--detach-sign"]
    try:
        done = subprocess.run(command, input="", capture_output=True, text=True)
    except FileNotFoundError:
        return "gpg is missing: apt install gnupg"
    if done.returncode == 0:
        return None
    home = os.environ.get("GNUPGHOME", "~/.gnupg")
    return f"{'; '.join(done.stderr.splitlines())}: see gpg --list-secret-keys (GNUPGHOME is {home})"


def head() -> str:
    """The commit that is released."""
    return output("git", "rev-parse", "HEAD")


def _of_versions(version: str) -> Iterator[str]:
    declared = {
        "pyproject.toml": re.search(
            r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
        ),
        "studio_worker/__init__.py": re.search(
            r'^__version__ = "(.*)"$', (ROOT / "studio_worker/__init__.py").read_text(), re.MULTILINE
        ),
    }
    for file, found in declared.items():
        if found is None or found[1] != version:
            yield f"{file} says {found and found[1]}, not {version}"
    changelog = ["dpkg-parsechangelog", "--file=debian/changelog", "--show-field"]
    if (packaged := output(*changelog, "Version")) != version:
        yield f"debian/changelog begins with {packaged}, not {version}"
    if (distribution := output(*changelog, "Distribution")) == "UNRELEASED":
        yield f"debian/changelog still calls {packaged} {distribution}"
    heading = re.search(r"^## (\S+) — (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if heading is None or heading[1] != version:
        yield f"CHANGELOG.md begins with {heading and heading[1]}, not {version}"
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", heading[2]):
        yield f"CHANGELOG.md calls {version} {heading[2]!r}: write the day of the release there"


def _of_locks() -> Iterator[str]:
    """Packages hold what the tests ran with, each file known by its hash."""
    tested = pins(ROOT / "packaging" / "constraints.txt")
    for lock in packaged_locks():
        lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        for line in lines:
            if not re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line):
                yield f"{lock.name}: no version or hash in {line!r}: make lock"
        is_ours = lock.stem in {"libraries", "farm"}
        for name, locked in pins(lock).items():
            if (name in tested or is_ours) and tested.get(name) != locked.partition("+")[0]:
                yield f"{lock.name} has {name} {locked}, the tests ran with {tested.get(name)}: make lock"


def packaged_locks() -> list[Path]:
    """The lock files of what goes into packages."""
    return [LOCK / "libraries.txt", LOCK / "farm.txt", *sorted(LOCK.glob("torch-*.txt"))]


def pins(file: Path) -> dict[str, str]:
    """Versions by name, of a lock file or of the constraints."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", file.read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}
