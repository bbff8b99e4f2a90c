"""Checks of the worker itself: its models, who it is to the studio, whether it runs, what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from studio_worker.appliance import another_machine
from studio_worker.appliance.provisioning import show_bytes, show_duration
from studio_worker.box.machine_id import machine_mark
from studio_worker.doctor.results import Box, Level, Result, failure, ok, warning
from studio_worker.errors import ConfigError, ControlDenied, ServiceNotRunning
from studio_worker.report.control import ask, runtime_dir
from studio_worker.report.snapshot import RegistrationFacts
from studio_worker.report.starts import Starts
from studio_worker.spool.in_hand import poisoned_jobs
from studio_worker.store.ledger import Ledger, is_verified
from studio_worker.studio.http.identity import (
    RENEW_GIVEN,
    IdentityFile,
    Standing,
    identity_name,
    reset_command,
)
from studio_worker.wording import to_service
from studio_worker.work.breaker import FAILURES

_AS_ROOT = "run this as root or as the service's user"
_RECENT_S = 24 * 3600.0
_OUTBOX_OLD_S = 3600.0
_WORST_FIRST: tuple[Level, ...] = ("failure", "warning", "ok")


def check_models(box: Box) -> Result:
    """By the ledger; nothing is read again."""
    root = box.config.settings.models.root
    files = [file for model in box.config.required for file in model.files]
    if not files:
        return ok("none is required; offers bring them")
    if not root.is_dir():
        return warning(f"{root} is not there yet", "the service makes it at its first start")
    try:
        ledger = Ledger(root)
    except PermissionError:
        return warning(f"{root} cannot be looked at by this user", _AS_ROOT)
    missing = [file for file in files if not is_verified(ledger, file)]
    if missing:
        size = show_bytes(sum(file.approx_bytes or 0 for file in missing))
        return warning(
            f"{len(missing)} of {len(files)} required file(s) are missing or changed since ({size})",
            "the next start downloads them; `studio-worker models pull` does so now",
        )
    return ok(f"{len(files)} required file(s) verified")


def check_registration(box: Box) -> Result:
    lanes = range(1, box.config.settings.worker.lanes + 1)
    found = {lane: _registration(box, lane) for lane in lanes}
    if len(found) == 1:
        return found[1]
    told = "; ".join(f"lane {lane}: {each.text}" for lane, each in found.items())
    worst = next(level for level in _WORST_FIRST if any(each.level == level for each in found.values()))
    cures: dict[str, list[str]] = {}
    for lane, each in sorted(found.items(), key=lambda one: _WORST_FIRST.index(one[1].level)):
        if each.cure:
            cures.setdefault(each.cure, []).append(f"{lane}")
    return Result(worst, told, "; ".join(f"lane {', '.join(each)}: {cure}" for cure, each in cures.items()))


def _registration(box: Box, lane: int) -> Result:
    for each in box.service.lanes if box.service is not None else ():
        if each.lane == lane and each.registration.is_given:
            return _given(each.registration)
    path = box.config.settings.state.dir / identity_name(lane)
    try:
        if not path.exists():
            return warning("this worker has not asked for registration yet", "start the service: it asks")
        identity = IdentityFile(path).load()
        kept = another_machine.kept_aside(path.parent)
    except PermissionError:
        return warning(f"{path} cannot be read by this user", _AS_ROOT)
    except ConfigError as error:  # one lane's; the others are looked at all the same
        return failure(f"{path} {error.problem}", error.cure)
    adopt = another_machine.adopt_cure(path.parent)
    if another_machine.is_foreign(identity, machine_mark(box.root)):
        return warning(
            f"{identity.describe()}, on another machine",
            f"the next start registers this machine anew; if it is the same worker, {adopt}",
        )
    besides = "" if kept is None else f"; {kept}"
    if identity.worker_id and identity.auth_token:
        return ok(identity.describe() + besides)
    if identity.rejected is not None:
        return failure(identity.describe(), f"talk to whoever runs the studio, then: {reset_command(path)}")
    if identity.standing is Standing.PENDING:
        cure = "approve this worker on the studio's page"
        cure += f"; or, if it is the same worker, {adopt}" if kept is not None else ""
        return warning(identity.describe() + besides, cure)
    return warning(identity.describe(), "start the service: it asks")


def _given(registration: RegistrationFacts) -> Result:
    """Of a lane whose id and token are systemd credentials: nothing of it is in the state folder."""
    if registration.state == "ended":
        cure = f"{RENEW_GIVEN}, then: {to_service('restart')}"
        return failure("the studio takes its systemd credentials no more", cure)
    return ok(f"approved as worker {registration.worker_id}, by systemd credentials")


def check_service(box: Box) -> Result:
    """Whether it runs, and whether the studio has it."""
    if (snapshot := box.service) is None:
        try:
            # It answers nothing: the reason is told in its own words.
            ask(runtime_dir(box.config.settings.state.runtime_dir), "status", 3.0)
        except ServiceNotRunning as error:
            return warning("not running", error.cure)
        except ControlDenied:
            return warning("this user may not ask it", _AS_ROOT)
        return failure("running, and does not answer in a readable way", to_service("restart"))
    text = f"{snapshot.status or snapshot.phase}; up {show_duration(snapshot.process.uptime_s)}"
    if snapshot.hangs:
        return failure(f"{text}; {snapshot.hangs}", to_service("restart"))
    if snapshot.paused:
        return warning(text, "studio-worker resume")
    ended = [str(lane.lane) for lane in snapshot.lanes if lane.registration.state == "ended"]
    if ended:
        cure = f"mend what `studio-worker status` says of it, then: {to_service('restart')}"
        return failure(f"{text}; lane {', '.join(ended)} ended, the others go on", cure)
    if snapshot.session.state == "reconnecting":
        return warning(text, "it tries again by itself; see studio")
    if "restart to apply" in snapshot.status:
        return warning(text, to_service("restart"))
    if "not reloaded" in snapshot.status:
        return warning(text, f"mend the configuration, then: {to_service('reload')}")
    if "offer was refused" in snapshot.status:
        return warning(
            text, "the reason tells what to change; the studio may have other workers for such jobs"
        )
    if snapshot.health.held or snapshot.health.failures >= FAILURES:
        return warning(text, "journalctl -u studio-worker OUTCOME=failed; mended, it goes on by itself")
    oldest = snapshot.outbox.oldest_at
    if oldest is not None and time.time() - oldest > _OUTBOX_OLD_S:
        age = show_duration(time.time() - oldest)
        return warning(f"{text}; a picture waits for delivery since {age}", "see studio, and the log")
    return ok(text)


def check_last_errors(box: Box) -> Result:
    """Crashes, jobs that were given up for them, pictures set aside; jobs that failed, lanes that ended."""
    state = box.config.settings.state.dir
    try:
        problems = list(_from_state(state))
    except PermissionError:
        return warning(f"{state} cannot be read by this user", _AS_ROOT)
    if box.service is not None:
        failed = [job for job in box.service.last_jobs if job.outcome in {"failed", "refused"}]
        problems += [f"job {job.job_id} {job.outcome}: {job.reason}" for job in failed[:3]]
        ended = [lane for lane in box.service.lanes if lane.registration.state == "ended"]
        problems += [f"lane {lane.lane} ended: {lane.registration.detail}" for lane in ended]
    if problems:
        return warning("; ".join(problems), "journalctl -u studio-worker -p warning")
    return ok("none")


def _from_state(state: Path) -> Iterator[str]:
    """Raises PermissionError where the folder is closed to us."""
    if not state.exists():
        return
    list(state.iterdir())
    starts = Starts.read(state)
    if starts.last_crash_at is not None and time.time() - starts.last_crash_at < _RECENT_S:
        at = datetime.fromtimestamp(starts.last_crash_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
        yield f"{starts.crashes} crash(es) so far, the last before {at}"
    for job in poisoned_jobs(state / "spool")[-3:]:
        yield f"job {job} is refused: it was in hand at two crashes"
    aside = state / "outbox" / "unreadable"
    if count := len(list(aside.glob("*.json"))):
        yield f"{count} picture(s) that could not be delivered lie in {aside}"
