"""Root among the folders of the service's user: it becomes that user before it opens anything there.

The service parses what strangers send. Should it fall, its folders may hold links and pipes laid out for
root; who has that user's rights alone can be led nowhere that the user could not go himself. It also leaves
no file of root's behind, at which the service would fail later.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

from studio_worker.errors import ConfigError
from studio_worker.files import fsync_directory
from studio_worker.wording import user

_DEVICE_GROUPS = ("video", "render")
"""What the unit adds to its user's groups (SupplementaryGroups=), for the GPU's device nodes."""

_DONE = b"done"


class Owner(NamedTuple):
    """A user and his first group, by number."""

    uid: int
    gid: int

    def groups(self) -> list[int]:
        """All groups that the service's process has of this user."""
        found = {self.gid}
        with contextlib.suppress(KeyError):  # a number without an entry, as in containers
            found |= set(os.getgrouplist(pwd.getpwuid(self.uid).pw_name, self.gid))
        for name in _DEVICE_GROUPS:
            with contextlib.suppress(KeyError):
                found.add(grp.getgrnam(name).gr_gid)
        return sorted(found)


def owner_of(*folders: Path) -> Owner | None:
    """Whose rights root is to go on with: of the owner of the first of ``folders`` that is not root's own.

    A folder that is yet to be made counts as the one that it will lie in. ``None`` where nothing changes.
    """
    if os.geteuid() != 0:
        return None
    for folder in folders:
        above = (folder, *folder.absolute().parents)
        found = next(path for path in above if path.exists()).stat()
        if found.st_uid != 0:
            return Owner(found.st_uid, found.st_gid)
    return None


def become(owner: Owner | None) -> None:
    """Go on with the rights of ``owner``, for good; ``None`` changes nothing.

    Raises:
        ConfigError: that user may not read the Python that this runs on.
    """
    if owner is None:
        return
    os.setgroups(owner.groups())
    os.setresgid(owner.gid, owner.gid, owner.gid)
    os.setresuid(owner.uid, owner.uid, owner.uid)
    # Libraries look for settings and caches of their own there, and root's are closed now.
    os.environ["HOME"] = "/"
    with contextlib.suppress(KeyError):
        os.environ["HOME"] = pwd.getpwuid(owner.uid).pw_dir
    closed = next((path for path in (os.__file__, __file__) if not os.access(path, os.R_OK)), None)
    if closed is not None:  # else the next import would fail, anywhere
        raise ConfigError(
            f"user {user()}, whose folders these are, may not read the program itself ({closed})",
            cure="install it where everybody may read it, as the package does",
        )


def give_folder(folder: Path, owner: Owner | None) -> None:
    """Make ``folder`` for ``owner`` where it is missing and the folder that it lies in is root's.

    Raises:
        OSError: it cannot be made, or its file system knows no owners.
    """
    if owner is not None and not folder.exists():
        folder.mkdir(parents=True)
        os.chown(folder, owner.uid, owner.gid, follow_symlinks=False)


@contextlib.contextmanager
def written_by_caller(dest: Path, owner: Owner | None) -> Iterator[IO[bytes]]:
    """A new file that gets the name ``dest`` at the end, with the rights of now, whoever we are by then.

    Inside, :func:`become` may be called; then a process that stayed behind gives the name. Nothing is left
    where the block fails or this process is killed.

    Args:
        owner: who we are about to become.

    Raises:
        OSError: ``dest`` cannot be written.
    """
    temporary = dest.with_name(f".{uuid.uuid4().hex}.tmp")
    file = temporary.open("xb")
    with file:
        temporary.chmod(0o644)
        if owner is None:
            try:
                yield file
                _finish(file, temporary, dest)
            finally:
                temporary.unlink(missing_ok=True)
            return
        asked, ask = os.pipe()
        told, tell = os.pipe()
        if (namer := os.fork()) == 0:
            os.close(ask)
            os.close(told)
            _name_when_asked(asked, tell, file, temporary, dest)
        os.close(asked)
        os.close(tell)
        try:
            with os.fdopen(ask, "wb", buffering=0) as asking:
                yield file
                file.flush()
                asking.write(_DONE)
        finally:
            with os.fdopen(told, "rb") as telling:
                problem = telling.read()
            os.waitpid(namer, 0)
        if problem:
            raise OSError(int(problem), os.strerror(int(problem)), str(dest))


def _name_when_asked(asked: int, tell: int, file: IO[bytes], temporary: Path, dest: Path) -> NoReturn:
    """What the process does that stays behind: it waits, names the file, and ends."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other one ends the work, and so this
        with os.fdopen(asked, "rb") as asking:
            is_done = asking.read() == _DONE
        if is_done:
            _finish(file, temporary, dest)
        status = 0
    except OSError as error:
        os.write(tell, str(error.errno).encode())
    finally:
        temporary.unlink(missing_ok=True)
        os._exit(status)


def _finish(file: IO[bytes], temporary: Path, dest: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    temporary.replace(dest)
    fsync_directory(dest.parent)
