"""The package by which a box knows the repository: key, address, and examples of what else apt may be told.

Apart from the worker's own build, since key and address are the operator's: the key comes from the key ring
in GNUPGHOME. Its version is that of the release which it is published with.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "studio-worker-archive-keyring"
KEYRING = f"usr/share/keyrings/{NAME}.gpg"
SOURCES = "etc/apt/sources.list.d/studio-worker.sources"
DOC = f"usr/share/doc/{NAME}"


def from_changelog(field: str) -> str:
    """A field of the newest entry of the worker's changelog."""
    command = ["dpkg-parsechangelog", f"--file={ROOT / 'debian/changelog'}", f"--show-field={field}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def public(keys: list[str]) -> bytes:
    """The public halves, as apt reads them.

    Raises:
        SystemExit: the key ring has none of that name.
    """
    found = b""
    for key in keys:
        command = ["gpg", "--batch", "--export-options=export-minimal", "--export", key]
        exported = subprocess.run(command, check=True, capture_output=True).stdout
        if not exported:
            sys.exit(f"no key {key} in {os.environ.get('GNUPGHOME', '~/.gnupg')}: name it by its fingerprint")
        found += exported
    return found


def fill(tree: Path, keys: list[str], address: str, version: str) -> None:
    """Everything that is in the package."""
    maintainer = from_changelog("Maintainer")
    files = {
        KEYRING: public(keys),
        SOURCES: (HERE / "studio-worker.sources").read_text().replace("@ADDRESS@", address).encode(),
        f"{DOC}/copyright": (ROOT / "debian" / "copyright").read_bytes(),
        f"{DOC}/changelog.gz": gzip.compress(
            f"{NAME} ({version}) stable; urgency=medium\n\n  * The repository at {address}.\n\n"
            f" -- {maintainer}  {from_changelog('Date')}\n".encode(),
            mtime=0,
        ),
        "DEBIAN/conffiles": f"/{SOURCES}\n".encode(),
        "DEBIAN/control": (HERE / "control")
        .read_text()
        .replace("@VERSION@", version)
        .replace("@MAINTAINER@", maintainer)
        .encode(),
    }
    files[f"usr/share/lintian/overrides/{NAME}"] = (HERE / "lintian-overrides").read_bytes()
    files |= {f"{DOC}/examples/{each.name}": each.read_bytes() for each in (HERE / "examples").iterdir()}
    sums = "DEBIAN/md5sums"
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    packed = sorted(name for name in files if not name.startswith(("DEBIAN/", "etc/")))
    command = ["md5sum", *packed]
    (tree / sums).write_bytes(subprocess.run(command, cwd=tree, check=True, capture_output=True).stdout)
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def main() -> None:
    """The command line; the Makefile's apt-repo calls it."""
    parser = argparse.ArgumentParser(description="Build the repository's keyring package.")
    parser.add_argument("folder", type=Path, help="where the package is written")
    parser.add_argument("--key", action="append", required=True, help="fingerprint; repeat while keys change")
    parser.add_argument("--address", required=True, help="the repository's, as boxes reach it")
    parser.add_argument("--version", default=from_changelog("Version"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    deb = given.folder / f"{NAME}_{given.version}_all.deb"
    with tempfile.TemporaryDirectory() as tree:
        fill(Path(tree), given.key, given.address.rstrip("/"), given.version)
        environment = {**os.environ, "SOURCE_DATE_EPOCH": from_changelog("Timestamp")}
        build = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, str(deb)]
        subprocess.run(build, check=True, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
