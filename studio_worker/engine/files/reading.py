"""What the system refuses whoever reads a weights file, told apart from damage."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from studio_worker.errors import JobError


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """While ``path`` is read: a disk that fails, or memory that runs out, says nothing of the file.

    Raises:
        JobError: the disk does not give it.
        MemoryError: there is no room to map it.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(error.strerror) from error
        raise JobError(f"{path.name} cannot be read: {error.strerror or error}") from error
