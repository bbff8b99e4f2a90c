"""Pictures that wait for delivery under an identity that is to be forgotten: under another the studio takes
none of them. They are not lost unless somebody says so. Asks the files; the state folder is locked.
"""

from __future__ import annotations

from pathlib import Path

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.spool.picture_files import PictureFiles
from studio_worker.studio.http.identity import IdentityFile, Standing, identity_name

_LOSE = "give --drop-pictures to lose them"


def give_up(state: Path, lane: int | None, lanes: int, *, drop: bool) -> int:
    """See to it that nothing waits for ``lane``, or for any of those that have an identity here: it is
    dropped, or refused; returns how much was. So many ``lanes`` run here.

    Raises:
        StateUnavailable: pictures wait, and nobody said that they may be dropped.
    """
    folder = state / "outbox"
    if not folder.is_dir():
        return 0
    files = PictureFiles(folder)
    waiting = [
        each
        for each in files.read_all()
        if lane in {None, each.lane} and (state / identity_name(each.lane)).exists()
    ]
    if waiting and not drop:
        raise StateUnavailable(
            f"{_pictures(len(waiting))} for delivery under this identity",
            source=str(folder),
            cure=_cure(state, {each.lane for each in waiting}, lanes),
        )
    for each in waiting:
        files.remove(each.job_id)
    return len(waiting)


def _pictures(count: int) -> str:
    return "1 picture waits" if count == 1 else f"{count} pictures wait"


def _cure(state: Path, whose: set[int], lanes: int) -> str:
    """What brings them to the studio, by what the identities of those ``whose`` they are say."""
    approved, damaged = [], []
    for lane in sorted(whose):
        try:
            identity = IdentityFile(state / identity_name(lane)).found()
        except ConfigError:
            damaged.append(lane)
            continue
        if identity is not None and identity.standing is Standing.APPROVED:
            approved.append(lane)
    if approved and approved[-1] > lanes:
        return f"set [worker] lanes = {approved[-1]} and start the service to deliver them, or {_LOSE}"
    if approved:
        return f"start the service to deliver them, or {_LOSE}"
    if damaged:
        return f"restore the identity from a backup to deliver them, or {_LOSE}"
    return f"the studio takes them under no other one: {_LOSE}"
