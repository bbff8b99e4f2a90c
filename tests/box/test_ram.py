"""How much memory there is for this process: of the machine, and of the control groups around it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from studio_worker.box.ram import available_ram_bytes, total_ram_bytes

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 64 GiB, 48 of them available, and the process in the service's control group."""
    write(tmp_path / "proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/studio-worker.service\n")
    limit(tmp_path / "sys/fs/cgroup", "", "max", 20)
    limit(tmp_path / "sys/fs/cgroup", "system.slice", "max", 18)
    limit(tmp_path / "sys/fs/cgroup", "system.slice/studio-worker.service", "max", 16)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit(top: Path, group: str, most: str, used_gib: int, *, file_gib: int = 0) -> None:
    """What Linux shows of a control group."""
    if group:  # the topmost has no limits
        write(top / group / "memory.max", most)
        write(top / group / "memory.high", "max")
    write(top / group / "memory.current", str(used_gib * GIB))
    stat = f"anon {(used_gib - file_gib) * GIB}\nactive_file {file_gib * GIB // 2}\n"
    write(top / group / "memory.stat", f"{stat}inactive_file {file_gib * GIB // 2}\nslab_reclaimable 0\n")


def test_memory_is_the_machines_where_nothing_limits_it(root: Path) -> None:
    """Without a limit a process may have what the machine has."""
    assert total_ram_bytes(root) == 64 * GIB
    assert available_ram_bytes(root) == 48 * GIB


def test_memory_max_of_the_unit_is_all_there_is(root: Path) -> None:
    """MemoryMax= in the unit leaves so much less for models, whatever the machine has free; pages of files
    that were read count as free, as they do for the machine.
    """
    limit(root / "sys/fs/cgroup", "system.slice/studio-worker.service", str(32 * GIB), 16, file_gib=12)
    assert total_ram_bytes(root) == 32 * GIB
    assert available_ram_bytes(root) == 28 * GIB


def test_memory_high_is_a_limit_too(root: Path) -> None:
    """Beyond MemoryHigh= a process crawls, so that it is not planned with either."""
    write(root / "sys/fs/cgroup/system.slice/studio-worker.service/memory.high", str(24 * GIB))
    assert (total_ram_bytes(root), available_ram_bytes(root)) == (24 * GIB, 8 * GIB)


def test_limit_of_a_slice_around_the_unit_holds(root: Path) -> None:
    """The narrowest limit counts, also one of a slice that the unit shares with others."""
    limit(root / "sys/fs/cgroup", "system.slice", str(20 * GIB), 18)
    limit(root / "sys/fs/cgroup", "system.slice/studio-worker.service", str(32 * GIB), 16)
    assert (total_ram_bytes(root), available_ram_bytes(root)) == (20 * GIB, 2 * GIB)


def test_limit_of_a_container_is_seen_inside(root: Path) -> None:
    """Inside a container its own group is the topmost that shows, and has a limit."""
    write(root / "proc/self/cgroup", "0::/\n")
    write(root / "sys/fs/cgroup/memory.max", str(8 * GIB))
    write(root / "sys/fs/cgroup/memory.current", str(9 * GIB))
    assert (total_ram_bytes(root), available_ram_bytes(root)) == (8 * GIB, 0)


def test_this_machine_is_read() -> None:
    """The files are where this Linux has them, of whichever version its control groups are."""
    assert (
        0
        < available_ram_bytes()
        < total_ram_bytes()
        <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def test_first_version_of_control_groups_is_no_error(root: Path) -> None:
    """Where Linux shows control groups in their first version, the machine's figures hold."""
    write(root / "proc/self/cgroup", "4:memory:/system.slice\n1:name=systemd:/\n0::/\n")
    for path in (root / "sys/fs/cgroup").rglob("memory.*"):
        path.unlink()
    assert available_ram_bytes(root) == 48 * GIB
