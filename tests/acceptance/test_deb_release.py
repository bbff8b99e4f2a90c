"""A release by one command: what it refuses, what it makes, and what it says that it has not done."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.archive import KeyRing
from tests.acceptance.bases import BUILT_ON, SUITE
from tests.acceptance.conftest import ROOT, Debs
from tests.acceptance.packages import stand_in
from tests.fakes.vulnerability_database import Database

pytestmark = pytest.mark.skipif(SUITE != BUILT_ON, reason=f"of the build alone: checked with {BUILT_ON}")

VERSION = "9.8.7"
TAKEN = ("packaging/constraints.txt", "packaging/lock", "packaging/release")
"""What of this tree the command reads as it is; the rest of a tree is made to be released."""
MAKEFILE = """
deb:
\tmkdir -p build/packages
\tcp -L $(BUILT)/*.deb build/packages
\t$(SPOIL)
"""


@pytest.fixture(scope="module")
def tools() -> None:
    """The command's own tools, installed once."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "release-tools.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make = "import release; release.make_tools()"
        command = ["/usr/bin/python3.11", "-c", make]
        subprocess.run(command, cwd=ROOT / "packaging" / "release", check=True)


@pytest.fixture
def keys() -> Iterator[KeyRing]:
    with KeyRing() as keys:
        yield keys


class Tree:
    """A tree that is ready to be released, all of it committed, whose build copies packages."""

    def __init__(self, folder: Path, keys: KeyRing) -> None:
        self.folder = folder
        self.keys = keys
        self.environment = {**keys.environment, "GIT_CONFIG_GLOBAL": "/dev/null"}
        for name in TAKEN:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, folder / name)
        self.write("Makefile", MAKEFILE)
        self.write(".gitignore", "/build/\n__pycache__/\n")
        self.write("pyproject.toml", f'version = "{VERSION}"\n')
        self.write("studio_worker/__init__.py", f'__version__ = "{VERSION}"\n')
        self.write("CHANGELOG.md", f"# Changelog\n\n## {VERSION} — 2026-11-27\n")
        self.write("debian/changelog", _changelog("stable"))
        shutil.copyfile(ROOT / "debian/torch.changelog", folder / "debian/torch.changelog")
        self.git("init", "--quiet")
        self.commit()

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def git(self, *arguments: str) -> None:
        command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
        subprocess.run(command, cwd=self.folder, env=self.environment, check=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=as it is")

    def release(self, *options: str) -> subprocess.CompletedProcess[str]:
        """The command; its stderr is in its stdout."""
        command = ["/usr/bin/python3.11", "packaging/release/release.py", VERSION, *options]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _changelog(distribution: str, version: str = VERSION) -> str:
    return (
        f"studio-worker ({version}) {distribution}; urgency=medium\n\n  * A change.\n\n"
        " -- A Maintainer <maintainer@localhost>  Fri, 27 Nov 2026 00:00:00 +0000\n"
    )


@pytest.fixture
def tree(tmp_path: Path, keys: KeyRing) -> Tree:
    (tmp_path / "tree").mkdir()
    return Tree(tmp_path / "tree", keys)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("pyproject.toml", 'version = "9.8.6"\n', "pyproject.toml says 9.8.6, not 9.8.7"),
        ("studio_worker/__init__.py", '__version__ = "9.8.6"\n', "__init__.py says 9.8.6, not 9.8.7"),
        ("debian/changelog", _changelog("stable", "9.8.6"), "debian/changelog begins with 9.8.6, not 9.8.7"),
        ("debian/changelog", _changelog("UNRELEASED"), "debian/changelog still calls 9.8.7 UNRELEASED"),
        ("CHANGELOG.md", "## 9.8.6 — 2026-11-01\n", "CHANGELOG.md begins with 9.8.6, not 9.8.7"),
        ("CHANGELOG.md", "## 9.8.7 — unreleased\n", "CHANGELOG.md calls 9.8.7 'unreleased'"),
        ("packaging/constraints.txt", "", "libraries.txt has"),
        ("packaging/lock/torch-cpu.txt", "torch==2.13.0\n", "torch-cpu.txt: no version or hash"),
    ],
)  # fmt: skip
def test_release_is_refused(tree: Tree, file: str, text: str, words: str) -> None:
    """Versions that differ, a changelog without this version, locks of other versions: nothing is built."""
    tree.write(file, text)
    tree.commit()
    done = tree.release("--key", tree.keys.key)
    assert (done.returncode, words in done.stdout) == (1, True), done.stdout
    assert not (tree.folder / "build").exists()


def test_release_of_a_changed_tree_is_refused(tree: Tree) -> None:
    """What is not committed, or under another commit's tag, is not released."""
    tree.git("tag", f"v{VERSION}")
    tree.write("new.py", "")
    done = tree.release("--key", tree.keys.key)
    assert (done.returncode, "?? new.py" in done.stdout) == (1, True), done.stdout
    tree.commit()
    done = tree.release("--key", tree.keys.key)
    assert (done.returncode, "another commit" in done.stdout) == (1, True), done.stdout


def test_release_without_a_key_is_refused_unless_asked_for(tree: Tree) -> None:
    """No key, or one that is not there: said before anything is built."""
    done = tree.release()
    assert (done.returncode, "no key is given" in done.stdout) == (1, True), done.stdout
    done = tree.release("--key", "0" * 40)
    assert (done.returncode, "No secret key" in done.stdout) == (1, True), done.stdout
    tree.write("pyproject.toml", "")
    tree.commit()
    assert "no key" not in tree.release("--unsigned").stdout


def test_release_with_a_key_that_cannot_sign_is_refused(tree: Tree) -> None:
    """A key that has run out, or whose passphrase nobody gives: said before anything is built."""
    expired = tree.keys.generate_expired("runs out")
    done = tree.release("--key", expired)
    assert (done.returncode, f"{expired} cannot sign" in done.stdout) == (1, True), done.stdout
    locked = tree.keys.generate_locked("nobody knows its passphrase")
    done = tree.release("--key", locked)
    assert (done.returncode, f"{locked} cannot sign" in done.stdout) == (1, True), done.stdout
    assert not (tree.folder / "build").exists()


@pytest.fixture
def ready(tree: Tree, tools: None, debs: Debs, tmp_path: Path) -> Iterator[tuple[Tree, Database]]:
    """A tree that builds stand-ins of the packages, and a database that knows nothing bad."""
    (tree.folder / "build").mkdir()
    (tree.folder / "build" / "release-tools").symlink_to(ROOT / "build" / "release-tools")
    (tmp_path / "built").mkdir()
    stand_in(debs.worker, tmp_path / "built", Version=VERSION)
    stand_in(debs.torch, tmp_path / "built")
    stand_in(debs.farm, tmp_path / "built", Version=VERSION)
    database = Database()
    threading.Thread(target=database.serve_forever, daemon=True).start()
    tree.environment |= {
        "BUILT": str(tmp_path / "built"),
        "PIP_AUDIT_VULNERABILITY_SERVICE": "osv",
        "PIP_AUDIT_OSV_URL": f"http://127.0.0.1:{database.server_port}/v1/query",
        "NO_PROXY": "127.0.0.1",
    }
    yield tree, database
    database.shutdown()
    database.server_close()


def test_release_is_made(ready: tuple[Tree, Database]) -> None:
    """Packages, what is in them by the standard's schema, hashes, a signature, and what to publish."""
    tree, database = ready
    done = tree.release("--key", tree.keys.key)
    assert done.returncode == 0, done.stdout
    assert {"pillow", "torch", "nvidia-cublas", "psycopg-binary"} <= database.asked
    folder = tree.folder / "build" / "release" / VERSION
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    tree.keys.gpg("--verify", str(folder / "SHA256SUMS.asc"), str(folder / "SHA256SUMS"))
    hashed = {line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert hashed == {each.name for each in folder.iterdir()} - {"SHA256SUMS", "SHA256SUMS.asc"}
    assert f"make apt-repo PACKAGES=build/release/{VERSION}" in done.stdout

    (path,) = folder.glob("studio-worker_*.cdx.json")
    _validate(path)
    bom = json.loads(path.read_text())
    assert bom["metadata"]["component"]["purl"] == f"pkg:deb/studio-worker@{VERSION}?arch=amd64"
    found = {each["name"]: each for each in bom["components"]}
    locked = (ROOT / "packaging" / "lock" / "libraries.txt").read_text()
    pillow = found["pillow"]
    assert f"pillow=={pillow['version']} --hash=sha256:{pillow['hashes'][0]['content']}\n" in locked
    assert found["python3.11"]["purl"].startswith("pkg:deb/debian/python3.11@3.11.")
    assert not {"torch", "psycopg"} & found.keys()
    (path,) = folder.glob("studio-worker-farm_*.cdx.json")
    _validate(path)
    assert {"psycopg", "boto3"} < {each["name"] for each in json.loads(path.read_text())["components"]}
    (path,) = folder.glob("studio-worker-torch-cpu_*.cdx.json")
    _validate(path)
    assert "torch" in {each["name"] for each in json.loads(path.read_text())["components"]}

    before = {each.name: each.read_bytes() for each in folder.glob("*.json")}
    assert tree.release("--unsigned").returncode == 0
    assert {each.name: each.read_bytes() for each in folder.glob("*.json")} == before
    assert not (folder / "SHA256SUMS.asc").exists()


def test_signature_that_fails_in_the_end_is_said_in_words(ready: tuple[Tree, Database]) -> None:
    """What is built stays, with the command that signs it later; so do releases of other versions."""
    tree, _ = ready
    tree.write("build/release/9.8.6/SHA256SUMS", "an earlier one")
    tree.environment["SPOIL"] = f"gpg --batch --yes --delete-secret-keys {tree.keys.key} || true"
    done = tree.release("--key", tree.keys.key)
    assert (done.returncode, "Traceback" in done.stdout) == (6, False), done.stdout
    sums = f"build/release/{VERSION}/SHA256SUMS"
    assert f"gpg --local-user {tree.keys.key} --armor --detach-sign {sums}" in done.stdout
    assert (tree.folder / sums).exists()
    assert (tree.folder / "build/release/9.8.6/SHA256SUMS").read_text() == "an earlier one"


def _validate(path: Path) -> None:
    """By the schema that cyclonedx-python-lib carries."""
    script = (
        "import sys; from pathlib import Path; from cyclonedx.schema import SchemaVersion as V;"
        "from cyclonedx.validation.json import JsonStrictValidator as Check;"
        "sys.exit(Check(V.V1_6).validate_str(Path(sys.argv[1]).read_text()))"
    )
    subprocess.run([ROOT / "build" / "release-tools/bin/python", "-c", script, path], check=True)


def test_release_with_a_known_vulnerability_is_refused_until_it_is_accepted(
    ready: tuple[Tree, Database],
) -> None:
    """What is known of a library stops the release before the build; a written reason lets it through."""
    tree, database = ready
    database.known = {"pillow"}
    done = tree.release("--unsigned")
    assert done.returncode == 4, done.stdout
    assert "GHSA-test" in done.stdout
    assert not (tree.folder / "build" / "release").exists()
    accepted = "packaging/release/accepted-vulnerabilities.txt"
    tree.write(accepted, (tree.folder / accepted).read_text() + "GHSA-test  reads no such file here\n")
    tree.commit()
    done = tree.release("--unsigned")
    assert done.returncode == 0, done.stdout


def test_release_says_when_vulnerabilities_were_not_looked_up(ready: tuple[Tree, Database]) -> None:
    """Without an answer of the database the release is made, and its report and exit status tell so."""
    tree, database = ready
    database.shutdown()
    database.server_close()
    done = tree.release("--unsigned")
    assert done.returncode == 3, done.stdout
    assert "NOT LOOKED UP" in done.stdout
    assert "no vulnerabilities are known" not in done.stdout
    assert (tree.folder / "build" / "release" / VERSION / "SHA256SUMS").exists()


def test_silence_of_the_database_is_no_all_clear(ready: tuple[Tree, Database]) -> None:
    """pip-audit calls what its database does not know free of vulnerabilities; a release does not."""
    tree, _ = ready
    tools = tree.folder / "build" / "release-tools"
    tools.unlink()
    skipped = {"name": "pillow", "skip_reason": "Dependency not found on PyPI and could not be audited"}
    answer = json.dumps({"dependencies": [skipped], "fixes": []})  # and exit status 0, as 2.10.1 has it
    for name, script in (
        ("pip-audit", f"echo '{answer}'; echo 'No known vulnerabilities found' >&2"),
        ("python", f'exec {ROOT}/build/release-tools/bin/python "$@"'),
    ):
        tree.write(f"build/release-tools/bin/{name}", f"#!/bin/sh\n{script}\n")
        (tools / "bin" / name).chmod(0o755)
    shutil.copyfile(tree.folder / "packaging/lock/release.txt", tools / "installed.txt")
    done = tree.release("--unsigned")
    assert (done.returncode, "not found on PyPI" in done.stdout) == (3, True), done.stdout


def test_release_that_builds_differently_the_second_time_is_refused(ready: tuple[Tree, Database]) -> None:
    """A package that depends on the builder's clock is no release."""
    tree, _ = ready
    tree.environment["SPOIL"] = "date +%Z >>build/packages/studio-worker-torch-cpu_*.deb"
    done = tree.release("--unsigned")
    assert done.returncode == 5, done.stdout
    assert "different bytes: studio-worker-torch-cpu_" in done.stdout
