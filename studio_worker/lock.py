"""One service a state folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from studio_worker.errors import ConfigError


@contextlib.contextmanager
def state_lock(folder: Path) -> Iterator[None]:
    """Hold the state folder for this process.

    Raises:
        ConfigError: another process, most likely the service, holds it.
    """
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is in use by a running service",
                key="state.dir",
                cure="stop it first (systemctl stop studio-worker) or name another folder",
            ) from None
        yield
