"""Writing files so that a crash leaves either the old content or the new one, never a part.

What root writes into a folder of the service user is given to that user, or the service could not read it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from pathlib import Path

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a disk, or of a user's share of it, that takes no more."""
DISK_TROUBLES = DISK_FULL | {errno.EIO}
"""Those, and that of a disk that fails: no fault of the program's."""


def write_atomic(path: Path, content: bytes, *, mode: int = 0o600, sync_folder: bool = True) -> None:
    """Replace ``path`` with ``content``: unique temporary file beside it, fsync, rename, directory fsync.

    Args:
        sync_folder: ``False`` where the caller goes on to something else in the folder that syncs it.
    """
    temporary = path.with_name(
        f".{uuid.uuid4().hex}.tmp"
    )  # without the name, which may be as long as allowed
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        own_like_folder(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if sync_folder:
        fsync_directory(path.parent)


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
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def own_like_folder(path: Path) -> None:
    """What root has just made in the folder of a service user belongs to that user, who has to read it."""
    if os.geteuid() != 0:
        return
    folder, made = path.parent.stat(), path.lstat()
    # A file with a second name may be somebody else's that was linked here to be given away.
    is_only_name = made.st_nlink == 1 or stat.S_ISDIR(made.st_mode)
    if folder.st_uid != 0 and made.st_uid == 0 and is_only_name:
        os.chown(path, folder.st_uid, folder.st_gid, follow_symlinks=False)


def own_tree(root: Path) -> None:
    """The same for everything below ``root``."""
    if os.geteuid() == 0 and root.is_dir() and root.stat().st_uid != 0:
        for folder, folders, names in os.walk(root):
            for name in (*folders, *names):
                with contextlib.suppress(FileNotFoundError):
                    own_like_folder(Path(folder, name))


def make_folder(path: Path) -> None:
    """Make ``path`` and the folders above it, each owned like the one it lies in."""
    if not path.is_dir():
        if path.parent != path:
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        own_like_folder(path)
