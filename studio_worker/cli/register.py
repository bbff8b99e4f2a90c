"""The command that shows, forgets or brings along who this worker is to the studio, lane by lane."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from studio_worker import config
from studio_worker.box.machine_id import machine_mark
from studio_worker.box.owner import become, owner_of
from studio_worker.cli.options import ConfigDir, Instance, say
from studio_worker.errors import ConfigError, StudioWorkerError
from studio_worker.report.snapshot import RegistrationFacts, Snapshot

_NOBODY = "not registered: the service asks the studio when it starts"


def register(
    directory: ConfigDir = config.DEFAULT_DIR,
    instance: Instance = None,  # noqa: ARG001  (it has had its effect)
    reset: Annotated[
        bool, typer.Option("--reset", help="Forget this worker's identity; the next start asks anew.")
    ] = False,
    lane: Annotated[
        int | None,
        typer.Option("--lane", metavar="N", min=1, help="With --reset: forget that of this lane alone."),
    ] = None,
    drop_pictures: Annotated[
        bool,
        typer.Option(
            "--drop-pictures", help="With --reset: also where finished pictures wait for delivery; they go."
        ),
    ] = False,
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="Go on as the worker that this disk was in another machine."),
    ] = False,
) -> None:
    """Show who this worker is to the studio, forget it, or bring it along from another machine.

    Exit status 75 where --reset would lose finished pictures, or while the service runs; 1 where --adopt
    finds nothing of another machine.
    """
    if reset and adopt:
        raise typer.BadParameter("--adopt keeps what --reset forgets: give one of them")
    if not reset and (lane is not None or drop_pictures):
        raise typer.BadParameter("--lane and --drop-pictures go with --reset")
    settings = config.load(directory).settings
    become(owner_of(settings.state.dir, settings.models.root))
    config.check_folders(settings, make=False)
    if reset:
        _forget(settings.state.dir, lane, settings.worker.lanes, drop_pictures=drop_pictures)
    elif adopt:
        _adopt(settings.state.dir)
    else:
        _show(settings.state.dir, settings.worker.lanes, _running(settings.state.runtime_dir))


def _running(configured: Path) -> dict[int, RegistrationFacts]:
    """What the running service knows of each lane, where one answers."""
    from studio_worker.report.control import ask, runtime_dir

    with contextlib.suppress(StudioWorkerError, ValueError):
        answer = Snapshot.model_validate(ask(runtime_dir(configured), "status", limit_s=3.0))
        return {lane.lane: lane.registration for lane in answer.lanes}
    return {}


def _show(state: Path, lanes: int, running: dict[int, RegistrationFacts]) -> None:
    from studio_worker.appliance import another_machine
    from studio_worker.studio.http.identity import IdentityFile, identity_name, lane_identities, lane_of

    is_given = 1 in running and running[1].is_given
    if not is_given and not _is_somebody(state):
        say(_NOBODY)
        return
    first = IdentityFile(state / identity_name(1)).found()
    told = "not registered" if first is None else another_machine.told(first, machine_mark(), state)
    if is_given:
        told = f"worker {running[1].worker_id}, by systemd credentials"
    others = lane_identities(state)
    told += _ended(running, 1)
    say(f"lane 1: {told}" if others or lanes > 1 else told)
    for path in others:
        if (found := IdentityFile(path).found()) is not None:
            lane = lane_of(path)
            besides = _ended(running, lane) if lane <= lanes else f" (not in use: [worker] lanes = {lanes})"
            say(f"lane {lane}: {found.describe()}{besides}")
    if (kept := another_machine.kept_aside(state)) is not None:
        say(f"{kept}; to go on as that worker, {another_machine.adopt_cure(state)}")


def _ended(running: dict[int, RegistrationFacts], lane: int) -> str:
    """That a lane has ended, and why; what is on disk of it does not say so."""
    facts = running.get(lane)
    return f"; ended: {facts.detail}" if facts is not None and facts.state == "ended" else ""


def _forget(state: Path, lane: int | None, lanes: int, *, drop_pictures: bool) -> None:
    from studio_worker.appliance import another_machine
    from studio_worker.box.state_lock import state_lock
    from studio_worker.studio.http.identity import identity_name

    if not _is_somebody(state):
        say(_NOBODY)
        return
    if lane is not None and lane > lanes and not (state / identity_name(lane)).exists():
        raise typer.BadParameter(f"there is no lane {lane}: [worker] lanes = {lanes}")
    with state_lock(state):
        dropped = another_machine.forget(
            state, machine_mark(), lane, lanes=lanes, drop_pictures=drop_pictures
        )
    whose = "identity" if lane is None else f"identity of lane {lane}"
    lost = f" and {dropped} picture(s) dropped" if dropped else ""
    say(f"{whose} forgotten{lost}; the next start of the service asks to be registered anew")


def _adopt(state: Path) -> None:
    """Exit status 1 where there is nobody to go on as, so that a script can tell."""
    from studio_worker.appliance import another_machine
    from studio_worker.box.state_lock import state_lock

    identity = None
    if _is_somebody(state):
        with state_lock(state):
            identity = another_machine.adopt(state, machine_mark())
    if identity is None:
        typer.echo("nothing here is another machine's", err=True)
        raise typer.Exit(1)
    say(f"from now on {identity.describe()}")


def _is_somebody(state: Path) -> bool:
    """Whether an identity is here, of any lane, or kept aside. Raises ConfigError: instances have theirs."""
    from studio_worker.appliance import another_machine
    from studio_worker.studio.http.identity import identity_name, lane_identities

    if (state / identity_name(1)).exists() or lane_identities(state):
        return True
    if another_machine.kept_aside(state) is not None:
        return True
    if others := sorted({path.parent.name for path in state.glob("instance-*/identity*.json")}):
        names = ", ".join(name.removeprefix("instance-") for name in others)
        raise ConfigError("this box has a service for each GPU", cure=f"say which: --instance N, of {names}")
    return False
