"""What the file system refuses a download, in words, and with its cure where that is known."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from studio_worker.errors import StoreError
from studio_worker.files import DISK_FULL
from studio_worker.transfer.wanted import Wanted

_CURES = {
    errno.EFBIG: "the file system, or a limit of this process, takes no file of this size: set [models] root "
    "to a folder on ext4 or xfs, or raise LimitFSIZE",
    errno.EMFILE: "raise the limit of files that this process may open (LimitNOFILE), or lower [models] "
    "max_connections",
    errno.ENFILE: "raise the limit of files that this machine may have open (fs.file-max)",
}


@contextlib.contextmanager
def disk_errors(wanted: Wanted, staging: Path) -> Iterator[None]:
    """An OSError becomes an error of the download, or of the store where only the operator can help."""
    try:
        yield
    except OSError as error:
        if error.errno in _CURES:
            raise StoreError(f"{staging}: {error.strerror}; {_CURES[error.errno]}") from error
        what = (
            f"no space left on the disk of {staging}: {error.strerror}"
            if error.errno in DISK_FULL
            else f"{error.strerror}: {error.filename or staging}"
        )
        raise wanted.broken(what) from error
