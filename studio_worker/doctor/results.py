"""What is right and wrong with this box: checks that each stand alone, and the line each comes to.

A check reads and tries out; it changes nothing that stays. One that crashes or hangs is a failure with its
name, and the others are told all the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from studio_worker.config import Config
from studio_worker.errors import StudioWorkerError
from studio_worker.report.logs import redact
from studio_worker.report.snapshot import Snapshot

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """What one check comes to. ``cure`` is there wherever ``level`` is not ``ok``."""

    check: str
    level: Level
    text: str
    cure: str = ""
    took_s: float = 0.0


@dataclass(frozen=True)
class Result:
    """A finding before its check's name is on it."""

    level: Level
    text: str
    cure: str = ""


def ok(text: str) -> Result:
    return Result("ok", text)


def warning(text: str, cure: str) -> Result:
    return Result("warning", text, cure)


def failure(text: str, cure: str) -> Result:
    return Result("failure", text, cure)


@dataclass(frozen=True)
class Box:
    """What the checks look at.

    Args:
        directory: the configuration folder.
        loaded: the configuration, where it is valid.
        service: what the running service says of itself, where one answers.
        root: the file system's root; tests put another machine there.
    """

    directory: Path
    loaded: Config | None = None
    service: Snapshot | None = None
    root: Path = field(default=Path("/"))

    @property
    def config(self) -> Config:
        """The valid configuration; only for checks that need one."""
        assert self.loaded is not None
        return self.loaded


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        look: does it; what it raises becomes a failure.
        limit_s: how long it may take.
        needs_config: left out while the configuration is wrong.
    """

    name: str
    look: Callable[[Box], Result]
    limit_s: float = 20.0
    needs_config: bool = True


def examine(box: Box, checks: Sequence[Check]) -> list[Finding]:
    """Every check's finding, in order; all run at once, so it takes as long as the longest of them."""
    began = time.monotonic()
    found: dict[str, Finding] = {}
    threads = []
    for check in checks:
        if check.needs_config and box.loaded is None:
            found[check.name] = Finding(
                check.name, "warning", "not checked", "mend the configuration, then run this again"
            )
            continue

        def look(check: Check = check) -> None:
            found[check.name] = _finding(check, box)

        # Daemons: one that hangs in a driver or on a dead disk must not hold up the end of the process.
        thread = threading.Thread(target=look, name=f"check {check.name}", daemon=True)
        thread.start()
        threads.append((check, thread))
    for check, thread in threads:
        thread.join(max(0.0, began + check.limit_s - time.monotonic()))
    return list(_in_order(checks, dict(found)))


def _finding(check: Check, box: Box) -> Finding:
    began = time.monotonic()
    try:
        result = check.look(box)
    except StudioWorkerError as error:
        problem, _, cure = str(error).rpartition("; ")
        result = (
            failure(problem, cure)
            if problem
            else failure(str(error), "see the log: journalctl -u studio-worker")
        )
    except PermissionError as error:
        result = warning(
            f"{error.filename} may not be looked at by this user", "run this as root or as the service's user"
        )
    except Exception as error:  # a check of ours that fails must not hide what the others have found
        result = failure(
            f"the check itself failed ({type(error).__name__}: {error})",
            "report this as a bug of studio-worker",
        )
    return Finding(
        check.name,
        result.level,
        _line(result.text),
        _line(result.cure),
        took_s=round(time.monotonic() - began, 3),
    )


def _line(text: str) -> str:
    return redact(" ".join(text.split()))


def _in_order(checks: Iterable[Check], found: dict[str, Finding]) -> Iterable[Finding]:
    for check in checks:
        yield found.get(check.name) or Finding(
            check.name,
            "failure",
            f"no answer within {check.limit_s:g} s",
            "what it looks at hangs: see dmesg for the disk or the GPU; a reboot may be needed",
            took_s=check.limit_s,
        )
