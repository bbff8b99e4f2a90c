"""One service a state folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.files import own_like_folder


@contextlib.contextmanager
def state_lock(folder: Path) -> Iterator[None]:
    """Hold the state folder for this process.

    Raises:
        StateUnavailable: another process holds it: the service, or one that was killed and hangs in a driver.
        ConfigError: it cannot be opened.
    """
    path = folder / "lock"
    try:
        file = path.open("a")
        own_like_folder(path)
    except OSError as error:
        raise ConfigError(
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
                cure="stop it first (systemctl stop studio-worker) or name another folder",
            ) from None
        yield
