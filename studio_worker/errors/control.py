"""The running service could not be asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from studio_worker.errors.base import StudioWorkerError
from studio_worker.wording import in_container, to_service


class ControlError(StudioWorkerError):
    """The running service could not be asked over its control socket."""


class ServiceNotRunning(ControlError):
    """Nobody listens on the control socket ``path``. ``instances`` of the service may.

    Args:
        start: the command that starts it, where that is none of systemd's.
    """

    exit_status: ClassVar[int] = 3  # LSB: program is not running

    def __init__(self, path: Path, instances: Sequence[str] = (), start: str = "") -> None:
        self.path = path
        # studio-worker@N.service has its socket in /run/studio-worker-N.
        unit = path.parent.name.replace("studio-worker-", "studio-worker@", 1)
        start = start or to_service("start", unit if "@" in unit else "studio-worker")
        self.cure = "start the container, or see its log" if in_container() else f"start it: {start}"
        if instances:
            self.cure = f"its instances do: give --instance N, of {', '.join(instances)}"
        super().__init__(f"the service is not running (nobody listens on {path}); {self.cure}")


class ControlDenied(ControlError):
    """This user may not use the control socket ``path``."""

    exit_status: ClassVar[int] = 4  # LSB: insufficient privilege

    def __init__(self, path: Path) -> None:
        who = "the container's own user" if in_container() else "root: sudo studio-worker …"
        super().__init__(f"this user may not use {path}; run the command as {who}")
