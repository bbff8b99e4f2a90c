"""One service a state folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.files import DISK_TROUBLES, open_plain
from studio_worker.wording import to_service, unit_of


@contextlib.contextmanager
def state_lock(folder: Path) -> Iterator[None]:
    """Hold the state folder for this process.

    Raises:
        StateUnavailable: another process holds it: the service, or one that was killed and hangs in a driver.
        ConfigError: it cannot be opened.
    """
    path = folder / "lock"
    try:
        file = os.fdopen(open_plain(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    except OSError as error:
        kind = StateUnavailable if error.errno in DISK_TROUBLES else ConfigError
        raise kind(
            f"cannot be opened: {error.strerror}",
            source=str(path),
            key="state.dir",
            cure="give the service's user access to it",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateUnavailable(
                f"{folder} is in use by a running service",
                key="state.dir",
                cure=f"stop it first: {to_service('stop', unit_of(folder))}",
            ) from None
        yield
