"""The apt repository, as a box uses it: install, upgrade, hold, roll back; what is not signed is refused."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import WEIGHTS
from tests.acceptance import figures
from tests.acceptance.archive import KEYRING, Archive, KeyRing
from tests.acceptance.bases import BUILT_ON, SUITE
from tests.acceptance.box import UNIT, Box
from tests.acceptance.conftest import Debs
from tests.acceptance.machine import Machine, MachineError
from tests.acceptance.packages import repack, stand_in

said_once = pytest.mark.skipif(SUITE != BUILT_ON, reason=f"of the files alone: checked with {BUILT_ON}")

NEXT = "0.6.0"
EXAMPLES = f"/usr/share/doc/{KEYRING}/examples"
SOURCES = "/etc/apt/sources.list.d/studio-worker.sources"
CANDIDATE = "/etc/apt/sources.list.d/studio-worker-candidate.sources"
PREFERENCES = "/etc/apt/preferences.d/studio-worker.pref"


@pytest.fixture
def archive(work: Path, tmp_path: Path) -> Iterator[Archive]:
    """An empty repository; on the machines' disk, so that large packages are copied quickly."""
    folder = work / f"archive-{tmp_path.name}"
    folder.mkdir()
    with KeyRing() as keys, Archive(folder, keys) as archive:
        yield archive


@pytest.fixture
def machine(base: Path, work: Path, tmp_path: Path) -> Iterator[Machine]:
    """A machine that has nothing of ours."""
    with Machine([base], work / tmp_path.name) as machine:
        yield machine


def apt(machine: Machine, *arguments: str) -> str:
    done = machine.run("apt-get", "-y", "-q", "-o", "Dpkg::Use-Pty=0", *arguments)
    return done.stdout + done.stderr


def planned(machine: Machine, *arguments: str) -> list[str]:
    """The packages that apt would install."""
    lines = apt(machine, "--simulate", *arguments).splitlines()
    return [line.split()[1] for line in lines if line.startswith("Inst ")]


def version(machine: Machine, package: str = "studio-worker") -> str:
    """What is installed."""
    return machine.run("dpkg-query", "--show", "-f", "${Version}", package).stdout


def test_box_lives_on_the_repository(
    archive: Archive, machine: Machine, debs: Debs, work: Path, tmp_path: Path
) -> None:
    """Two commands and apt install; what is promoted arrives by apt upgrade, and one command goes back."""
    cuda = stand_in(debs.torch, work, Package="studio-worker-torch-cuda")
    archive.publish(debs.worker, debs.torch, cuda, suite="stable")
    archive.subscribe(machine)
    assert "studio-worker-torch-cuda" in planned(machine, "install", "studio-worker")  # without being named
    apt(machine, "install", "studio-worker", "studio-worker-torch-cpu")
    old = version(machine)
    with LocalStudio(tmp_path / "studio.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio:
        box = Box(machine, studio)
        box.configure()
        box.start()
        worker_id = box.await_online()

        archive.publish(repack(debs.worker, NEXT, work))
        apt(machine, "update")
        assert planned(machine, "upgrade") == []
        machine.shell(f"sed 's/^Suites:.*/Suites: candidate/' {SOURCES} >{CANDIDATE}")
        apt(machine, "update")
        assert planned(machine, "upgrade") == ["studio-worker"]
        machine.shell(f"rm {CANDIDATE}")
        archive.make("apt-promote")
        apt(machine, "update")
        machine.run("apt-mark", "hold", "studio-worker")
        assert planned(machine, "upgrade") == []
        machine.run("apt-mark", "unhold", "studio-worker")
        apt(machine, "upgrade")
        assert version(machine) == NEXT
        machine.await_that("the service is back", lambda: box.show("ActiveState") == "active")

        example = machine.path(f"{EXAMPLES}/studio-worker.pref").read_text()
        machine.write(PREFERENCES, re.sub(r"(?<=Pin: version ).*", old, example))
        apt(machine, "upgrade", "--allow-downgrades")
        assert version(machine) == old
        assert planned(machine, "upgrade") == []
        machine.await_that("the service is back", lambda: box.show("ActiveState") == "active")
        assert box.await_online() == worker_id
        box.await_job(box.queue_picture(), "done")
    assert machine.show(UNIT, "NRestarts") == "0"
    figures.note("installed, upgraded, rolled back from the repository", "yes")


def test_nothing_is_installed_that_is_not_signed(
    archive: Archive, machine: Machine, debs: Debs, work: Path
) -> None:
    """A package with another byte, an index without signature or with a stranger's: apt takes none."""
    worker = stand_in(debs.worker, work, Version="0.1", Depends="libc6")
    archive.publish(worker, suite="stable")
    archive.subscribe(machine)
    (deb,) = archive.folder.glob("pool/studio-worker_*.deb")
    whole = deb.read_bytes()
    deb.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(MachineError, match="Hash Sum mismatch"):
        apt(machine, "install", "studio-worker")
    deb.write_bytes(whole)
    apt(machine, "install", "studio-worker")

    archive.publish(stand_in(debs.worker, work, Version="0.2", Depends="libc6"), suite="stable")
    suite = archive.folder / "dists" / "stable"
    signed = {name: (suite / name).read_text() for name in ("InRelease", "Release.gpg")}
    for name in signed:
        (suite / name).unlink()
    with pytest.raises(MachineError, match="no longer signed"):
        apt(machine, "update")
    assert planned(machine, "upgrade") == []
    altered = signed["InRelease"].replace("Suite: stable", "Suite: stable ")
    (suite / "InRelease").write_text(altered.replace("Label: studio-worker", "Label: another"))
    assert re.search("signature|BADSIG", apt(machine, "update"))
    assert planned(machine, "upgrade") == []
    with KeyRing() as stranger:
        (suite / "InRelease").unlink()
        stranger.gpg("--output", str(suite / "InRelease"), "--clear-sign", str(suite / "Release"))
    assert re.search("signature|NO_PUBKEY", apt(machine, "update"))
    assert planned(machine, "upgrade") == []
    (suite / "InRelease").write_text(signed["InRelease"])
    apt(machine, "update")
    assert planned(machine, "upgrade") == ["studio-worker"]


def test_way_back_to_another_torch_names_both_packages(
    archive: Archive, machine: Machine, debs: Debs, work: Path
) -> None:
    """Where the newer worker came with a newer torch, one command that names both versions goes back."""
    for number, minor in ((1, 13), (2, 14)):
        torch = f"studio-worker-torch (>= 2.{minor}~), studio-worker-torch (<< 2.{minor + 1}~)"
        archive.publish(
            stand_in(debs.worker, work, Version=f"0.{number}", Depends=torch),
            stand_in(debs.torch, work, Version=f"2.{minor}-1", Provides=f"studio-worker-torch (= 2.{minor})"),
            suite="stable",
        )
    archive.subscribe(machine)
    apt(machine, "install", "studio-worker", "studio-worker-torch-cpu")
    assert (version(machine), version(machine, "studio-worker-torch-cpu")) == ("0.2", "2.14-1")
    apt(machine, "install", "--allow-downgrades", "studio-worker=0.1", "studio-worker-torch-cpu=2.13-1")
    assert (version(machine), version(machine, "studio-worker-torch-cpu")) == ("0.1", "2.13-1")


def test_key_is_replaced_by_upgrades_alone(
    archive: Archive, machine: Machine, debs: Debs, work: Path
) -> None:
    """One release signed by the old key and the new brings the new one to every box; then the old may go."""
    old, new = archive.keys.key, archive.keys.generate("its successor")
    archive.publish(stand_in(debs.worker, work, Version="0.1", Depends="libc6"), suite="stable")
    archive.subscribe(machine)
    apt(machine, "install", "studio-worker")
    for number, keys in ((2, f"{old} {new}"), (3, new)):
        deb = stand_in(debs.worker, work, Version=f"0.{number}", Depends="libc6")
        archive.publish(deb, suite="stable", KEY=keys, KEYRING_VERSION=f"99.{number}")
        assert "W:" not in apt(machine, "update")
        assert set(planned(machine, "upgrade")) == {"studio-worker", KEYRING}
        apt(machine, "upgrade")
    assert version(machine) == "0.3"


def test_unattended_upgrades_take_the_worker_where_they_are_told_to(
    archive: Archive, machine: Machine, debs: Debs, work: Path
) -> None:
    """The example for unattended-upgrades makes it take a new version, and nothing else does."""
    apt(machine, "update")
    apt(machine, "install", "--no-install-recommends", "unattended-upgrades")
    archive.publish(stand_in(debs.worker, work, Version="0.1", Depends="libc6"), suite="stable")
    archive.subscribe(machine)
    apt(machine, "install", "studio-worker")
    archive.publish(stand_in(debs.worker, work, Version="0.2", Depends="libc6"), suite="stable")
    apt(machine, "update")
    machine.run("unattended-upgrade")
    assert version(machine) == "0.1"
    machine.shell(f"cp {EXAMPLES}/52studio-worker-upgrades /etc/apt/apt.conf.d/")
    machine.run("unattended-upgrade")
    assert version(machine) == "0.2"


@said_once
def test_what_is_published_stays_what_it_is(archive: Archive, debs: Debs, work: Path) -> None:
    """A published version never changes; the same packages, key and date give the same bytes."""
    first = stand_in(debs.worker, work, Version="0.1")
    archive.keys.environment["SOURCE_DATE_EPOCH"] = str(4_000_000_000)
    archive.publish(first)
    before = {path: path.read_bytes() for path in archive.folder.rglob("*") if path.is_file()}
    archive.publish(first)
    assert {path: path.read_bytes() for path in archive.folder.rglob("*") if path.is_file()} == before
    other = stand_in(debs.worker, work, Version="0.1", Section="misc")
    assert "a change needs a new version" in archive.publish(other, check=False)
    assert {path: path.read_bytes() for path in archive.folder.rglob("*") if path.is_file()} == before
    # A box that has read InRelease a moment ago still finds what it names.
    archive.publish(stand_in(debs.worker, work, Version="0.2"))
    indexes = [path for path in before if path.parent.parent.name == "by-hash"]
    assert indexes
    assert all(path.read_bytes() == before[path] for path in indexes)


@said_once
def test_keyring_package_keeps_to_debians_rules(archive: Archive, debs: Debs, work: Path) -> None:
    """lintian finds neither errors nor warnings in it."""
    archive.publish(stand_in(debs.worker, work, Version="0.1"))
    command = ["lintian", "--allow-root", "--fail-on=error,warning", archive.folder / f"{KEYRING}.deb"]
    environment = {**os.environ, "TMPDIR": str(work)}  # it leaves files behind
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@said_once
def test_version_that_is_withdrawn_is_gone(archive: Archive, debs: Debs, work: Path) -> None:
    """A bad release is taken out of a suite by one command, and its file leaves with the last suite."""
    bad = stand_in(debs.worker, work, Version="0.1")
    archive.publish(bad)
    archive.make("apt-promote")
    for suite in ("candidate", "stable"):
        assert (archive.folder / "pool" / bad.name).exists()
        archive.make("apt-withdraw", APT_SUITE=suite, PACKAGE="studio-worker", VERSION="0.1")
    assert not (archive.folder / "pool" / bad.name).exists()
    assert f"stable of {archive.folder} has no studio-worker 0.1" in archive.make(
        "apt-withdraw", APT_SUITE="stable", PACKAGE="studio-worker", VERSION="0.1", check=False
    )
