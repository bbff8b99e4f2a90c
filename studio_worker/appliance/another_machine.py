"""A state folder that wakes up in another machine: a copy of an image must not be the same worker twice.

Looked at before anything of the folder is used. What the other machine left (who it is to the studio,
pictures that it still delivers itself, notes of its jobs) is kept aside, and this machine registers as a
worker of its own. Where it is the same disk, or the same machine with a new id, the operator says so, and
the worker goes on as who it was.

Every identity is on disk, here or aside, at any moment. One that is in force takes its things back at the
next start, wherever a kill has left them.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from studio_worker.appliance import undelivered
from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.files import DISK_TROUBLES, copy_atomic, fsync_directory, make_private
from studio_worker.studio.http.identity import Identity, IdentityFile, identity_name, lane_identities
from studio_worker.wording import register_command

log = logging.getLogger(__name__)

_FOLDER = "other-machines"
_NAME = identity_name(1)
_THINGS = ("outbox", "spool", "starts.json")
"""What belongs to one worker, beside its identity and those of further lanes; a lasting pause is the disk's,
and stays.
"""


@dataclass(frozen=True)
class Aside:
    """The identity of another machine, as it is kept."""

    folder: Path
    identity: Identity

    def __str__(self) -> str:
        return f"another machine's identity ({self.identity.describe()}) is kept in {self.folder}"


def adopt_cure(state: Path) -> str:
    """What an operator does where it is the same worker after all."""
    return f"stop the service, then: {register_command(state, '--adopt')}"


def settle(state: Path, machine: str | None) -> None:
    """See to it that the identity in ``state`` is this machine's, before it is used; the folder is locked.

    An identity without a machine, as earlier versions wrote it, becomes this one's.

    Args:
        machine: this machine's mark; ``None`` = not known, and everything stays.

    Raises:
        ConfigError: the identity cannot be read, or nothing may be moved.
        StateUnavailable: the disk takes nothing.
    """
    file = IdentityFile(state / _NAME, machine)
    if machine is None or (identity := _in_force(state, machine)) is None:
        return
    if identity.machine is None:
        with contextlib.suppress(StateUnavailable):  # the next start notes it; this one is to deliver
            identity = file.save(replace(identity, machine=machine))
    elif identity.machine != machine:
        folder = _exchange(state, identity, _newcomer(machine))
        log.warning(
            "this disk was another machine's: what it left is kept aside, this machine registers anew; "
            "if it is the same worker, stop the service, then: studio-worker register --adopt",
            extra={"op": "register", "worker_id": identity.worker_id, "kept_in": str(folder)},
        )
        return
    _take_back(state, identity)
    _mark_lanes(state, machine)


def adopt(state: Path, machine: str | None) -> Identity | None:
    """Go on as the worker of the other machine: the one in ``state``, or else the one last kept aside.

    What was in force until now is kept aside in its place. The folder is locked.

    Returns:
        who the worker is now; ``None`` where there is nothing of another machine.

    Raises:
        ConfigError, StateUnavailable: as :func:`settle`.
    """
    file = IdentityFile(state / _NAME, machine)
    present = _in_force(state, machine)
    if present is not None and is_foreign(present, machine):
        identity = file.save(replace(present, machine=machine))
        _take_back(state, identity)
        _mark_lanes(state, machine)
        return identity
    if (kept := kept_aside(state)) is None:
        return None
    identity = replace(kept.identity, machine=machine)
    _exchange(state, present, identity)
    _mark_lanes(state, machine)
    return identity


def forget(
    state: Path,
    machine: str | None,
    lane: int | None = None,
    *,
    lanes: int = 1,
    drop_pictures: bool = False,
) -> int:
    """Be nobody to the studio, all lanes or one: the next start registers anew. What is another machine's is
    kept aside, and then all of it. So many ``lanes`` run here.

    Returns:
        how many pictures were dropped with it.

    Raises:
        ConfigError, StateUnavailable: as :func:`settle`, and where pictures wait that nobody said to drop;
            never because the identity cannot be read.
    """
    file = IdentityFile(state / _NAME, machine)
    present = None
    with contextlib.suppress(ConfigError):  # a damaged one is forgotten, too
        present = _in_force(state, machine)
    if present is not None and is_foreign(present, machine):
        _exchange(state, present, _newcomer(machine))
    dropped = undelivered.give_up(state, lane, lanes, drop=drop_pictures)
    others = lane_identities(state)
    if lane == 1 and others:  # it says for all of them whose this folder is
        file.save(_newcomer(machine))
    elif lane in {None, 1}:
        file.reset()
    for path in others:
        if lane is None or path.name == identity_name(lane):
            path.unlink(missing_ok=True)
    return dropped


def is_foreign(identity: Identity, machine: str | None) -> bool:
    """Whether ``identity`` is that of another machine than the one with the mark ``machine``."""
    return None not in (identity.machine, machine) and identity.machine != machine


def told(identity: Identity, machine: str | None, state: Path) -> str:
    """One line for the operator: who the worker is, and where that is another machine's, what follows."""
    if not is_foreign(identity, machine):
        return identity.describe()
    return (
        f"{identity.describe()}, on another machine: the next start registers this one anew; "
        f"to go on as the same worker, {adopt_cure(state)}"
    )


def kept_aside(state: Path) -> Aside | None:
    """What was last set aside and can be read, if anything is."""
    files = (state / _FOLDER).glob(f"*/{_NAME}")
    for path in sorted(files, key=lambda each: each.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(ConfigError):
            if (identity := IdentityFile(path).found()) is not None:
                return Aside(path.parent, identity)
    return None


def _newcomer(machine: str | None) -> Identity:
    return Identity(str(uuid.uuid4()), machine=machine)


def _in_force(state: Path, machine: str | None) -> Identity | None:
    """The first lane's identity, which says for all lanes whose they are. Where it is missing beside others,
    a newcomer of their machine stands for it. Raises ConfigError.
    """
    if (identity := IdentityFile(state / _NAME, machine).found()) is not None:
        return identity
    for path in lane_identities(state):
        with contextlib.suppress(ConfigError):  # told when that lane is looked at
            if (found := IdentityFile(path).found()) is not None:
                return _newcomer(found.machine)
    return None


def _mark_lanes(state: Path, machine: str | None) -> None:
    """Further lanes are of the machine that the first one is of. What fails now is for the next start."""
    for path in lane_identities(state):
        with contextlib.suppress(ConfigError):
            file = IdentityFile(path)
            if (found := file.found()) is not None and found.machine != machine:
                file.save(replace(found, machine=machine))


def _exchange(state: Path, present: Identity | None, following: Identity) -> Path | None:
    """Keep ``present`` and its things aside, and put ``following`` into force; returns the folder aside.

    The one step that counts is the last writing of the identity: until then a start finds ``present`` there.
    """
    folder = None
    with _problems_told(state):
        if present is not None:
            folder = state / _FOLDER / _folder_name(present)
            make_private(folder.parent)
            make_private(folder)
            IdentityFile(folder / _NAME).save(present)
            _move(state, folder)
            fsync_directory(folder.parent)
            fsync_directory(state)
    IdentityFile(state / _NAME).save(following)
    _take_back(state, following)
    return folder


def _take_back(state: Path, identity: Identity) -> None:
    """What lies aside of the identity in force is no other machine's, or not any more."""
    folder = state / _FOLDER / _folder_name(identity)
    if not folder.is_dir():
        return
    with _problems_told(state):
        _move(folder, state)
        fsync_directory(state)
        if any((folder / name).exists() for name in _things(folder)):  # never over what is there already
            return
        (folder / _NAME).unlink(missing_ok=True)
        for each in (folder, folder.parent):
            with contextlib.suppress(OSError):  # something else is in there
                each.rmdir()


def _things(folder: Path) -> tuple[str, ...]:
    return (*_THINGS, *(path.name for path in lane_identities(folder)))


def _folder_name(identity: Identity) -> str:
    """One folder an install id, whatever stands in the file for it."""
    return uuid.uuid5(uuid.NAMESPACE_OID, identity.install_id).hex


def _move(source: Path, dest: Path) -> None:
    for name in _things(source):
        if (source / name).exists():
            _merge(source / name, dest / name)
    fsync_directory(dest)


def _merge(source: Path, dest: Path) -> None:
    """Move file by file, so that a kill in between is gone on from; what is at ``dest`` already stays.

    No folder is renamed: an overlay, which images and containers lie on, does not allow it (EXDEV).
    """
    if source.is_dir():
        dest.mkdir(mode=0o700, exist_ok=True)
        for each in list(source.iterdir()):
            _merge(each, dest / each.name)
        fsync_directory(dest)
        with contextlib.suppress(OSError):  # a link to another disk, or something that had to stay
            source.rmdir()
    elif dest.exists():
        if filecmp.cmp(source, dest, shallow=False):  # a kill came between copying and removing
            source.unlink()
    else:
        try:
            source.rename(dest)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy_atomic(source, dest)
            fsync_directory(dest.parent)
            source.unlink()


@contextlib.contextmanager
def _problems_told(state: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StateUnavailable if error.errno in DISK_TROUBLES else ConfigError
        raise kind(
            f"what is another machine's cannot be kept aside: {error.strerror}",
            source=str(error.filename or state),
            cure="make room on its disk, and give the service's user access to its folder",
        ) from error
