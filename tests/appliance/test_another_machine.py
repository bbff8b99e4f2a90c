"""A state folder in another machine: never two of one worker, and nothing lost on the way."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from studio_worker.appliance.another_machine import adopt, forget, kept_aside, settle
from studio_worker.errors import StateUnavailable
from studio_worker.jobs import Picture
from studio_worker.spool.outbox import Outbox
from studio_worker.studio.http.identity import Identity, IdentityFile, Standing
from tests.lab.spooled import job

HERE, THERE = "a" * 32, "b" * 32
"""The marks of two machines."""
APPROVED = Identity("install-1", worker_id="w1", auth_token="token-of-w1", machine=THERE)


def state_of(folder: Path, identity: Identity = APPROVED) -> Path:
    """The state folder of a worker with a finished picture that the studio has not got yet."""
    folder.mkdir(exist_ok=True)
    IdentityFile(folder / "identity.json").save(identity)
    Outbox(folder / "outbox").add(job(), Picture(b"picture", "webp", {}), {})
    (folder / "spool").mkdir()
    (folder / "spool" / "crashes.json").write_text('{"job-0": ["note"]}')
    (folder / "starts.json").write_text('{"starts": 7, "is_running": true}')
    return folder


def identity_in(folder: Path) -> Identity:
    found = IdentityFile(folder / "identity.json").found()
    assert found is not None
    return found


def waiting(folder: Path) -> list[str]:
    """The jobs whose pictures a service that starts now would deliver."""
    return [delivery.job_id for delivery in Outbox(folder / "outbox").oldest()]


@pytest.mark.parametrize(
    "identity",
    [
        APPROVED,
        Identity("install-1", secret="s" * 64, request_id="r1", machine=THERE),
        Identity("install-1", machine=THERE),
        Identity("install-1", rejected="not ours", machine=THERE),
    ],
    ids=lambda identity: identity.standing.value,
)
def test_copy_registers_anew(tmp_path: Path, identity: Identity, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the image's worker was to the studio, a copy asks as a new one, and says so."""
    settle(state_of(tmp_path, identity), HERE)
    found = identity_in(tmp_path)
    assert (found.standing, found.machine) == (Standing.PRISTINE, HERE)
    assert found.install_id != "install-1"
    assert "studio-worker register --adopt" in caplog.text
    assert "token-of-w1" not in caplog.text


def test_copy_delivers_nothing_of_the_original(tmp_path: Path) -> None:
    """Pictures, crashes and jobs of the other machine's worker are kept aside: that worker delivers them."""
    settle(state_of(tmp_path), HERE)
    assert waiting(tmp_path) == []
    assert not (tmp_path / "spool").exists()
    assert not (tmp_path / "starts.json").exists()
    kept = kept_aside(tmp_path)
    assert kept is not None
    assert kept.identity == APPROVED
    assert waiting(kept.folder) == ["job-1"]
    assert kept.folder.stat().st_mode & 0o077 == 0


def test_same_machine_goes_on(tmp_path: Path) -> None:
    """On the machine that the identity was made on, a start changes no byte of it."""
    state_of(tmp_path)
    before = (tmp_path / "identity.json").read_bytes()
    settle(tmp_path, THERE)
    assert (tmp_path / "identity.json").read_bytes() == before
    assert waiting(tmp_path) == ["job-1"]
    assert kept_aside(tmp_path) is None


def test_identity_of_an_earlier_version_becomes_this_machines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An upgrade registers nobody anew: an identity without a machine is noted as this one's, silently."""
    state_of(tmp_path, Identity("install-1", worker_id="w1", auth_token="token-of-w1"))
    settle(tmp_path, HERE)
    assert identity_in(tmp_path) == Identity("install-1", None, None, "w1", "token-of-w1", machine=HERE)
    assert caplog.records == []
    settle(tmp_path, THERE)
    assert identity_in(tmp_path).standing is Standing.PRISTINE


def test_full_disk_does_not_stop_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine cannot be noted, the worker goes on all the same: it has pictures to deliver."""
    state_of(tmp_path, Identity("install-1", worker_id="w1", auth_token="token-of-w1"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("studio_worker.studio.http.identity.write_atomic", full)
    settle(tmp_path, HERE)
    assert identity_in(tmp_path).worker_id == "w1"


def test_copy_on_a_full_disk_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be kept aside, the copy is no second worker for that: it waits for room."""
    state_of(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StateUnavailable, match="No space left"):
        settle(tmp_path, HERE)
    assert identity_in(tmp_path) == APPROVED


def test_machine_without_a_mark_goes_on(tmp_path: Path) -> None:
    """In a container the state volume is the worker, wherever it is mounted."""
    settle(state_of(tmp_path), None)
    assert identity_in(tmp_path) == APPROVED
    assert waiting(tmp_path) == ["job-1"]


def test_disk_that_was_moved_is_adopted_before_its_first_start(tmp_path: Path) -> None:
    """One command, and the moved disk's worker goes on in the new machine as if nothing had happened."""
    adopted = adopt(state_of(tmp_path), HERE)
    assert adopted is not None
    settle(tmp_path, HERE)
    assert identity_in(tmp_path).worker_id == "w1"
    assert waiting(tmp_path) == ["job-1"]
    assert kept_aside(tmp_path) is None


def test_disk_that_was_moved_is_adopted_after_its_first_start(tmp_path: Path) -> None:
    """Also when it has registered anew meanwhile: all of the worker comes back, and the new one is kept."""
    settle(state_of(tmp_path), HERE)
    anew = identity_in(tmp_path)
    adopted = adopt(tmp_path, HERE)
    assert adopted is not None
    assert (adopted.worker_id, identity_in(tmp_path).machine) == ("w1", HERE)
    assert waiting(tmp_path) == ["job-1"]
    assert (tmp_path / "spool" / "crashes.json").exists()
    kept = kept_aside(tmp_path)
    assert kept is not None
    assert kept.identity == anew
    settle(tmp_path, HERE)
    assert identity_in(tmp_path).worker_id == "w1"


def test_adopting_twice_takes_it_back(tmp_path: Path) -> None:
    """Who has adopted by mistake is, by the same command, who they were before."""
    settle(state_of(tmp_path), HERE)
    anew = identity_in(tmp_path)
    adopt(tmp_path, HERE)
    os.utime(next((tmp_path / "other-machines").glob("*/identity.json")))
    adopt(tmp_path, HERE)
    assert identity_in(tmp_path) == anew
    assert waiting(tmp_path) == []


def test_copy_of_a_copy_keeps_both(tmp_path: Path) -> None:
    """An identity that was kept aside is not written over by the next one."""
    settle(state_of(tmp_path), HERE)
    second = IdentityFile(tmp_path / "identity.json").save(
        Identity("install-2", worker_id="w2", auth_token="token-of-w2", machine=HERE)
    )
    settle(tmp_path, "c" * 32)
    texts = [path.read_text() for path in (tmp_path / "other-machines").glob("*/identity.json")]
    assert {json.loads(text)["worker_id"] for text in texts} == {"w1", second.worker_id}


def marks(state: Path) -> set[str]:
    return {json.loads(path.read_text())["machine"] for path in state.glob("identity*.json")}


@pytest.mark.parametrize("is_started", [False, True], ids=["before its first start", "after it"])
def test_adopting_is_of_all_lanes(tmp_path: Path, is_started: bool) -> None:
    """A moved disk's further lanes are the same workers too, and no other machine's any more."""
    second = IdentityFile(state_of(tmp_path) / "identity-2.json").save(
        replace(APPROVED, install_id="install-2", worker_id="w2")
    )
    if is_started:
        settle(tmp_path, HERE)
        assert not (tmp_path / "identity-2.json").exists()
    adopt(tmp_path, HERE)
    assert marks(tmp_path) == {HERE}
    assert IdentityFile(tmp_path / "identity-2.json").found() == replace(second, machine=HERE)


def test_copy_whose_first_lane_is_missing_is_no_twin_either(tmp_path: Path) -> None:
    """Where only a further lane's identity was copied, it is kept aside as well, and can be adopted."""
    state_of(tmp_path)
    (tmp_path / "identity.json").rename(tmp_path / "identity-2.json")
    settle(tmp_path, HERE)
    assert not (tmp_path / "identity-2.json").exists()
    assert waiting(tmp_path) == []
    adopt(tmp_path, HERE)
    assert marks(tmp_path) == {HERE}
    assert json.loads((tmp_path / "identity-2.json").read_text())["worker_id"] == "w1"


def test_copy_of_a_box_whose_first_lane_was_forgotten_is_no_twin(tmp_path: Path) -> None:
    """After the first lane alone was forgotten the folder still says whose it is."""
    state_of(tmp_path)
    IdentityFile(tmp_path / "identity-2.json").save(replace(APPROVED, install_id="install-2"))
    forget(tmp_path, THERE, 1, drop_pictures=True)
    assert identity_in(tmp_path).machine == THERE
    settle(tmp_path, HERE)
    assert not (tmp_path / "identity-2.json").exists()


def test_nothing_to_adopt(tmp_path: Path) -> None:
    """On a box that was never another machine's, adopting changes nothing."""
    assert adopt(tmp_path, HERE) is None
    IdentityFile(tmp_path / "identity.json").save(Identity("install-1", machine=HERE))
    assert adopt(tmp_path, HERE) is None
    assert identity_in(tmp_path) == Identity("install-1", machine=HERE)


def test_copy_that_forgets_delivers_nothing_either(tmp_path: Path) -> None:
    """``register --reset`` in a copy keeps the original's pictures from the new worker, too."""
    forget(state_of(tmp_path), HERE)
    assert not (tmp_path / "identity.json").exists()
    assert waiting(tmp_path) == []
    kept = kept_aside(tmp_path)
    assert kept is not None
    assert waiting(kept.folder) == ["job-1"]


def cannot_rename(source: Path, _dest: Path) -> None:
    """What a system says between two disks."""
    raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))


@pytest.mark.parametrize("kind", ["folders", "files"])
def test_disk_that_moves_nothing_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On an overlay, which moves no folder of a layer below, or with the outbox on a disk of its own, all of
    it goes and comes back as elsewhere.
    """
    state_of(tmp_path)
    real = os.rename

    def rename(source: Path, dest: Path) -> None:
        if source.is_dir() or kind == "files":
            cannot_rename(source, dest)
        real(source, dest)

    monkeypatch.setattr(os, "rename", rename)
    settle(tmp_path, HERE)
    assert waiting(tmp_path) == []
    adopt(tmp_path, HERE)
    assert waiting(tmp_path) == ["job-1"]
    (picture,) = (tmp_path / "outbox").glob("*.data")
    assert picture.read_bytes() == b"picture"


class Killed(BaseException):
    """The process ends here."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, doing: Callable[[], object]) -> bool:
    """Whether ``doing`` was ended at its ``step``-th change of the disk, before it was made."""
    count = itertools.count()

    def patched(real: Any) -> Any:
        def change(*arguments: Any, **named: Any) -> Any:
            if next(count) >= step:
                raise Killed
            return real(*arguments, **named)

        return change

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, patched(getattr(os, name)))
        try:
            doing()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("disks", ["one disk", "two disks"])
@pytest.mark.parametrize("back", [HERE, THERE], ids=["in the copy", "in the original"])
def test_copy_killed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str, disks: str) -> None:
    """A kill between any two steps: the next start of the copy has nothing of the original's in force, and
    the original, had its disk been in the other machine by mistake, has all of it.
    """
    if disks == "two disks":
        monkeypatch.setattr(os, "rename", cannot_rename)
    for step in itertools.count():
        state = state_of(tmp_path / str(step))
        was_killed = killed_at(step, monkeypatch, partial(settle, state, HERE))
        if not was_killed:
            break
        settle(state, back)
        if back == THERE:
            assert identity_in(state) == APPROVED, step
            assert waiting(state) == ["job-1"], step
            assert kept_aside(state) is None, step
        else:
            assert identity_in(state).standing is Standing.PRISTINE, step
            assert waiting(state) == [], step
            kept = kept_aside(state)
            assert kept is not None
            assert waiting(kept.folder) == ["job-1"], step
        shutil.rmtree(state)
    assert step > 5


def test_adopting_killed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between any two steps of the command: the next start is one of the two workers, with all that is
    that one's and nothing of the other, and the other is still there to be adopted.
    """
    became = set()
    for step in itertools.count():
        state = state_of(tmp_path / str(step))
        settle(state, HERE)
        IdentityFile(state / "identity.json").save(
            Identity("install-2", worker_id="w2", auth_token="token-of-w2", machine=HERE)
        )
        was_killed = killed_at(step, monkeypatch, partial(adopt, state, HERE))
        if not was_killed:
            break
        settle(state, HERE)
        worker = identity_in(state).worker_id
        became.add(worker)
        assert waiting(state) == (["job-1"] if worker == "w1" else []), step
        kept = kept_aside(state)
        assert kept is not None
        assert {worker, kept.identity.worker_id} == {"w1", "w2"}, step
        shutil.rmtree(state)
    assert became == {"w1", "w2"}
