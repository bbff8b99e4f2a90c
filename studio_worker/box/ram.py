"""How much memory this process may have: the machine's, or less where its control group says so.

systemd's ``MemoryMax=`` and a container's limit end a process that goes beyond them, whatever the machine has
free. They are read where Linux shows them: in the second version of control groups, for the process's own
group and every one around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def total_ram_bytes(root: Path = ROOT) -> int:
    """What this process may have at most, used or not."""
    return min([_meminfo(root, "MemTotal"), *(limit for _, limit in _limits(root))])


def available_ram_bytes(root: Path = ROOT) -> int:
    """What Linux could give this process without swapping, or ending it."""
    left = (limit - _held(group) for group, limit in _limits(root))
    return max(0, min([_meminfo(root, "MemAvailable"), *left]))


def _meminfo(root: Path, name: str) -> int:
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {name}")  # every kernel since 3.14 has it


def _limits(root: Path) -> Iterator[tuple[Path, int]]:
    """The control groups around this process that have a limit, and the limit."""
    top = root / "sys/fs/cgroup"
    group = top / _own_group(root).strip("/")
    while group.is_relative_to(top):
        for name in ("memory.max", "memory.high"):  # beyond the second a process is slowed to a crawl
            limit = _read(group / name)
            if limit and limit != "max":
                yield group, int(limit)
        group = group.parent


def _own_group(root: Path) -> str:
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):  # the second version's one hierarchy
            return line.removeprefix("0::")
    return ""


def _held(group: Path) -> int:
    """Bytes that a group has, but for what Linux would give up for more: pages of files."""
    counts = dict(line.split() for line in _read(group / "memory.stat").splitlines())
    given_up = sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    return max(0, int(_read(group / "memory.current") or 0) - given_up)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:  # the first version of control groups, or none
        return ""
