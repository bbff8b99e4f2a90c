"""Writing files so that a crash leaves either the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a disk, or of a user's share of it, that takes no more."""
DISK_TROUBLES = DISK_FULL | {errno.EIO, errno.EROFS}
"""Those, and of a disk that fails, or that was made read-only since it did: no fault of the program's."""

_COPY_BYTES = 1024 * 1024
_TEMPORARIES = ".*.tmp"


def write_atomic(path: Path, content: bytes, *, mode: int = 0o600, sync_folder: bool = True) -> None:
    """Replace ``path`` with ``content``: unique temporary file beside it, fsync, rename, directory fsync.

    Args:
        sync_folder: ``False`` where the caller goes on to something else in the folder that syncs it.
    """
    with _replacing(path, mode) as file:
        file.write(content)
    if sync_folder:
        fsync_directory(path.parent)


def store_atomic(path: Path, content: IO[bytes], *, mode: int = 0o600) -> int:
    """As :func:`write_atomic`, piece by piece from where ``content`` stands; returns the number of bytes."""
    with _replacing(path, mode) as writing:
        shutil.copyfileobj(content, writing, _COPY_BYTES)
        size_bytes = writing.tell()
    fsync_directory(path.parent)
    return size_bytes


def copy_atomic(source: Path, dest: Path) -> None:
    """The content of ``source`` under the name ``dest``, whole or not at all; from anywhere."""
    with source.open("rb") as reading, _replacing(dest, 0o666) as writing:  # but for what the umask takes
        shutil.copyfileobj(reading, writing, _COPY_BYTES)


@contextlib.contextmanager
def _replacing(path: Path, mode: int) -> Iterator[IO[bytes]]:
    """A file to be filled, which takes the place of ``path`` once it is on disk, or goes where that fails."""
    # Without the name, which may be as long as allowed.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync_directory(path: Path) -> None:
    """Make a rename or removal in the folder ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(folder: Path) -> None:
    """Make ``folder`` for this user alone (0700), and clear what a kill left half-written there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    remove_temporaries(folder)


def remove_temporaries(folder: Path) -> None:
    """Remove what :func:`write_atomic` left in ``folder`` when the process was killed in the middle."""
    for path in folder.glob(_TEMPORARIES):
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether :func:`write_atomic` has it in hand, or left it when the process was killed in the middle."""
    return path.match(_TEMPORARIES)


def write_problem(folder: Path) -> str | None:
    """Why nothing can be written into ``folder``, in a few words, or ``None``. Tried out: no mode and no
    mount tells of a disk that fails.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, b"x")
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def output_problem(path: Path) -> str | None:
    """Why no file can be put at ``path``, in a few words, or ``None``. A device, say, would be replaced."""
    if path.exists() and not path.is_file():
        return f"{path} is no plain file"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"folder {path.parent} is not there or not writable"
    return None


def open_plain(path: Path, flags: int, mode: int = 0o644) -> int:
    """A descriptor of ``path``, as of :func:`os.open`: of a plain file alone, and at once.

    Somebody else may have laid a link or a pipe there.

    Raises:
        OSError: as of :func:`os.open`; ``ELOOP`` for a link, ``EINVAL`` for a pipe, socket or device.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "is no plain file", str(path))
    return descriptor


def read_plain(path: Path) -> bytes:
    """What the plain file ``path`` holds.

    Raises:
        OSError: as of :func:`open_plain`.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        return file.read()


def others_can_read(path: Path) -> bool:
    """Whether others than its owner get at ``path``: by its mode, and by those of the folders above it.

    Raises:
        OSError: it is not there.
    """
    real = path.resolve(strict=True)
    return bool(real.stat().st_mode & 0o077) and all(above.stat().st_mode & 0o011 for above in real.parents)
