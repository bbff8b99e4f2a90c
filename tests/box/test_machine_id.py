"""The mark of a machine: its own on every machine, none where an id means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from studio_worker.box.machine_id import machine_mark

ID = "3d1219c7c4c5404aaa1f6d2a48adfda4"


def root_of(folder: Path, *, machine_id: str | bytes | None = ID, booted: bool = True) -> Path:
    """A file system's root of a machine with ``machine_id``."""
    (folder / "etc").mkdir(parents=True)
    (folder / "run/systemd").mkdir(parents=True)
    if machine_id is not None:
        content = machine_id if isinstance(machine_id, bytes) else f"{machine_id}\n".encode()
        (folder / "etc/machine-id").write_bytes(content)
    if booted:
        (folder / "run/systemd/system").mkdir()
    return folder


def test_mark_is_what_systemd_makes_of_the_id(tmp_path: Path) -> None:
    """The id itself is in no file of ours: what is kept is systemd's own hash of it for this program."""
    # systemd-id128 machine-id --app-specific=4896581c7b77469b855aa81b5dd8c12f, systemd 252
    assert machine_mark(root_of(tmp_path)) == "59c2f1b6fde64d6d875b22b48a80e14e"


@pytest.mark.parametrize("container", ["lxc", "systemd-nspawn"])
def test_container_that_is_a_whole_system_has_a_mark(tmp_path: Path, container: str) -> None:
    """A container that boots systemd and lives for years is told from its copies as a machine is."""
    root = root_of(tmp_path)
    (root / "run/systemd/container").write_text(container)
    assert machine_mark(root) == machine_mark(root_of(tmp_path / "machine"))


@pytest.mark.parametrize("container", ["docker", "podman", "oci", "wsl"])
def test_container_for_one_program_has_no_mark(tmp_path: Path, container: str) -> None:
    """A runtime makes up an id for each container; the volume with the state folder is the worker."""
    root = root_of(tmp_path)
    (root / "run/systemd/container").write_text(container)
    assert machine_mark(root) is None


@pytest.mark.parametrize(
    "machine_id",
    [None, "", "uninitialized", ID[:31], "0" * 32, "z" * 32, b"\xff" * 32],
    ids=["none", "empty", "uninitialized", "short", "zeros", "no hex", "no text"],
)
def test_machine_without_an_id_has_no_mark(tmp_path: Path, machine_id: str | bytes | None) -> None:
    """What is no id of machine-id(5), as images and first boots have it, tells no machine from another."""
    assert machine_mark(root_of(tmp_path, machine_id=machine_id)) is None


def test_system_that_systemd_has_not_booted_has_no_mark(tmp_path: Path) -> None:
    """In a container without systemd the id is the image's, new with every image that is built."""
    assert machine_mark(root_of(tmp_path, booted=False)) is None


def test_id_of_one_boot_is_no_mark(tmp_path: Path) -> None:
    """Where systemd could not write the id down it is new after each boot, and no reason to register."""
    root = root_of(tmp_path)
    (root / "proc/self").mkdir(parents=True)
    mounts = root / "proc/self/mountinfo"
    mounts.write_text("22 1 0:20 / / rw shared:1 - ext4 /dev/sda1 rw\n")
    assert machine_mark(root) is not None
    mounts.write_text(mounts.read_text() + "40 22 0:35 / /etc/machine-id ro - tmpfs tmpfs ro\n")
    assert machine_mark(root) is None
