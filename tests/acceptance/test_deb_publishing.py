"""A maintainer's slips with the apt repository: each is refused in one line, and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.archive import KEYRING, Archive, KeyRing
from tests.acceptance.bases import BUILT_ON, SUITE
from tests.acceptance.conftest import Debs
from tests.acceptance.packages import stand_in

pytestmark = pytest.mark.skipif(SUITE != BUILT_ON, reason=f"of the files alone: checked with {BUILT_ON}")

PACKAGE = "studio-worker"


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    """An empty repository."""
    with KeyRing() as keys, Archive(tmp_path, keys) as archive:
        yield archive


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Archive]:
    """A repository on a disk of its own, of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        with KeyRing() as keys, Archive(tmp_path, keys) as archive:
            archive.folder.rmdir()
            archive.folder = disk
            yield archive
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def files(archive: Archive) -> dict[Path, bytes]:
    """All that is there."""
    return {path: path.read_bytes() for path in archive.folder.rglob("*") if path.is_file()}


def bootstrap(archive: Archive) -> str | None:
    """The version that a new box would start with."""
    deb = archive.folder / f"{KEYRING}.deb"
    if not deb.exists():
        return None
    command = ["dpkg-deb", "--field", str(deb), "Version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_refused_packages_leave_nothing_behind(archive: Archive, debs: Debs, tmp_path: Path) -> None:
    """One package of several is refused: the others are as unpublished as before, and may be built anew."""
    archive.publish(stand_in(debs.torch, tmp_path, Version="1"))
    before = files(archive)
    worker = stand_in(debs.worker, tmp_path, Version="0.2")
    torch = stand_in(debs.torch, tmp_path, Version="1", Section="misc")
    assert "a change needs a new version" in archive.publish(torch, worker, check=False)
    assert "a change needs a new version" in archive.publish(worker, torch, check=False)
    broken = tmp_path / "broken.deb"
    broken.write_text("no package")
    assert "broken.deb" in archive.publish(worker, broken, check=False)
    assert files(archive) == before
    archive.publish(stand_in(debs.worker, tmp_path, Version="0.2", Section="misc"))


def test_failed_signature_leaves_nothing_behind(archive: Archive, debs: Debs, tmp_path: Path) -> None:
    """A key that cannot sign: one line says so, nothing is published, the next try may have other bytes."""
    archive.publish(stand_in(debs.worker, tmp_path, Version="0.1"))
    before = files(archive)
    deb = stand_in(debs.worker, tmp_path, Version="0.2")
    expired = archive.keys.generate_expired("runs out")
    said = archive.publish(deb, check=False, KEY=expired, KEYRING_VERSION="0.2")
    assert "nothing was changed" in said
    assert "gpg --list-secret-keys" in said
    assert files(archive) == before
    archive.publish(stand_in(debs.worker, tmp_path, Version="0.2", Section="misc"))


def test_file_in_no_suite_counts_as_unpublished(archive: Archive, debs: Debs, tmp_path: Path) -> None:
    """What an interrupted publication left in the pool does not stand in the way of the next one."""
    deb = stand_in(debs.worker, tmp_path, Version="0.1")
    pool = archive.folder / "pool"
    pool.mkdir()
    (pool / deb.name).write_text("half a package")
    archive.publish(deb)
    assert (pool / deb.name).read_bytes() == deb.read_bytes()


def test_new_box_starts_with_the_highest_version_of_the_keyring(
    archive: Archive, debs: Debs, tmp_path: Path
) -> None:
    """At the name that stays the same lies the highest version that a suite has, if one has any."""
    archive.publish(stand_in(debs.worker, tmp_path, Version="0.1"), KEYRING_VERSION="0.9")
    archive.publish(stand_in(debs.worker, tmp_path, Version="0.2"), KEYRING_VERSION="0.10")
    archive.publish(stand_in(debs.worker, tmp_path, Version="0.3"), KEYRING_VERSION="0.9")
    assert bootstrap(archive) == "0.10"
    archive.make("apt-withdraw", PACKAGE=KEYRING, VERSION="0.10")
    assert bootstrap(archive) == "0.9"
    archive.make("apt-promote")
    archive.make("apt-withdraw", PACKAGE=KEYRING, VERSION="0.9")
    assert bootstrap(archive) == "0.9"
    archive.make("apt-withdraw", APT_SUITE="stable", PACKAGE=KEYRING, VERSION="0.9")
    assert bootstrap(archive) is None


def test_promotion_of_nothing_is_refused(archive: Archive, debs: Debs, tmp_path: Path) -> None:
    """An empty candidate or a mistyped REPO is told; neither promotion nor withdrawal makes a folder."""
    elsewhere = tmp_path / "elsewhere"
    withdrawal = {"PACKAGE": PACKAGE, "VERSION": "0.1"}
    for repo in (archive.folder, elsewhere):
        assert f"candidate of {repo} has nothing" in archive.make("apt-promote", check=False, REPO=repo)
        said = archive.make("apt-withdraw", check=False, REPO=repo, **withdrawal)
        assert f"candidate of {repo} has no {PACKAGE} 0.1" in said
    assert not elsewhere.exists()
    assert not list(archive.folder.iterdir())
    archive.publish(stand_in(debs.worker, tmp_path, Version="0.1"))
    assert re.search(f"promoted to stable: .*{PACKAGE} 0.1$", archive.make("apt-promote"), re.MULTILINE)
    assert "stable has all of candidate already" in archive.make("apt-promote")


def test_repository_that_cannot_be_written_is_told_in_one_line(
    small: Archive, debs: Debs, tmp_path: Path
) -> None:
    """A full disk, one that is read-only, a file in place of the folder: a cure each, and no half files."""
    small.publish(stand_in(debs.worker, tmp_path, Version="0.1"))
    before = files(small)
    large = tmp_path / "large"
    subprocess.run(
        ["dpkg-deb", "--raw-extract", stand_in(debs.worker, tmp_path, Version="0.2"), large], check=True
    )
    (large / "content").write_bytes(bytes(range(256)) * 1000)
    subprocess.run(
        ["dpkg-deb", "-Znone", "--build", large, tmp_path / f"{PACKAGE}_0.2_amd64.deb"], check=True
    )
    told = small.publish(tmp_path / f"{PACKAGE}_0.2_amd64.deb", check=False)
    assert "No space left on device: make room there" in told
    assert files(small) == before
    deb = stand_in(debs.worker, tmp_path, Version="0.3")
    subprocess.run(["mount", "-o", "remount,ro", small.folder], check=True)
    assert "Read-only file system: it must be writable for you" in small.publish(deb, check=False)
    (tmp_path / "file").touch()
    for target in ("apt-promote", "apt-repo"):
        said = small.make(
            target, check=False, REPO=tmp_path / "file", URL=small.address, PACKAGES=deb.parent / "incoming"
        )
        assert "REPO has to be a folder" in said
        assert "Traceback" not in said + told


def test_address_that_is_none_is_refused(archive: Archive, debs: Debs) -> None:
    """Boxes are not given an address that apt cannot fetch from."""
    for address in ("foo", "ftp://apt.example.org", "https:/apt.example.org", "https://a:b/x"):
        said = archive.publish(debs.worker, check=False, URL=address)
        assert f"URL={address}: give it as https://HOST/FOLDER" in said
        assert "Traceback" not in said
    assert not list(archive.folder.iterdir())


def test_version_that_is_none_is_refused(archive: Archive, debs: Debs) -> None:
    """A mistyped version of the keyring package is told in one line."""
    said = archive.publish(debs.worker, check=False, KEYRING_VERSION="next/one")
    assert "KEYRING_VERSION=next/one" in said
    assert "Traceback" not in said


def test_other_address_asks_for_a_version_of_the_keyring(
    archive: Archive, debs: Debs, tmp_path: Path
) -> None:
    """Another URL or KEY under the same version is refused, with the variable that is the cure."""
    deb = stand_in(debs.worker, tmp_path, Version="0.1")
    archive.publish(deb, KEYRING_VERSION="0.5")
    said = archive.publish(deb, check=False, KEYRING_VERSION="0.5", URL="https://apt.example.org")
    assert re.search(r"URL or KEY .*differs? from .*KEYRING_VERSION=0\.5\+1", said)
    archive.publish(deb, KEYRING_VERSION="0.5+1", URL="https://apt.example.org")
    assert bootstrap(archive) == "0.5+1"
