"""The commands that ask the running service: status, pause, resume."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from studio_worker import config
from studio_worker.cli.options import ConfigDir, Instance, Json, show
from studio_worker.errors import ControlError, ServiceNotRunning
from studio_worker.report.control import ask, runtime_dir
from studio_worker.report.snapshot import EndedJob, GpuFacts, JobFacts, LaneFacts, ResidentModel, Snapshot


def status(
    directory: ConfigDir = config.DEFAULT_DIR,
    instance: Instance = None,  # noqa: ARG001  (it has had its effect)
    as_json: Json = False,
    is_alive: Annotated[
        bool,
        typer.Option("--alive", help="For probes: exit status 1 where it hangs until it is restarted."),
    ] = False,
    is_ready: Annotated[
        bool,
        typer.Option("--ready", help="For probes: exit status 1 before it is ready and when it stops."),
    ] = False,
) -> None:
    """Show what the running service is doing and has done; exit status 3 where it does not run."""
    snapshot = Snapshot.model_validate(_ask(directory, "status"))
    if is_alive or is_ready:
        typer.echo(f"{snapshot.phase}: {snapshot.hangs or snapshot.status}")
        raise typer.Exit(bool(snapshot.hangs) or (is_ready and snapshot.phase != "ready"))
    if as_json:
        typer.echo(snapshot.model_dump_json(indent=2))
        return
    now = time.time()
    show(_facts(snapshot, now), *([_last_jobs(snapshot.last_jobs, now)] if snapshot.last_jobs else []))


def pause(
    directory: ConfigDir = config.DEFAULT_DIR,
    instance: Instance = None,  # noqa: ARG001  (it has had its effect)
    lasting: Annotated[bool, typer.Option("--lasting", help="Over restarts too, until `resume`.")] = False,
) -> None:
    """Take no more jobs until `resume` or the next start; the job in hand ends, then models leave the GPU."""
    answer = _ask(directory, "pause-lasting" if lasting else "pause")
    if problem := answer.get("problem"):
        raise ControlError(f"paused, but only until the next start: that cannot be noted ({problem})")
    if answer["phase"] in {"draining", "stopping"}:
        typer.echo("the service is stopping and takes no more jobs anyway")
    elif len(jobs := answer.get("job_ids", ())) > 1:
        typer.echo(f"paused; jobs {', '.join(jobs)} are being finished")
    elif answer["job_id"]:
        typer.echo(f"paused; job {answer['job_id']} is being finished")
    else:
        typer.echo("paused; no job is in hand")


def resume(directory: ConfigDir = config.DEFAULT_DIR, instance: Instance = None) -> None:  # noqa: ARG001
    """Take jobs again."""
    answer = _ask(directory, "resume")
    if answer["phase"] in {"draining", "stopping"}:
        typer.echo("the service is stopping and takes no more jobs")
    else:
        typer.echo("resumed")


def _ask(directory: Any, command: str) -> dict[str, Any]:
    try:
        return ask(runtime_dir(config.load(directory).settings.state.runtime_dir), command)
    except ServiceNotRunning as error:
        if directory == config.DEFAULT_DIR:
            raise
        # A folder of one's own: no unit of the package serves it.
        start = f"studio-worker run --config {directory}"
        raise ServiceNotRunning(error.path, start=start) from None


def _facts(snapshot: Snapshot, now: float) -> Any:
    """A table of two columns: what, and how it is."""
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in (
        ("studio-worker", f"{snapshot.version}: {snapshot.status or snapshot.phase}"),
        ("process", _process(snapshot)),
        *_lanes(snapshot, now),
        ("outbox", _outbox(snapshot, now)),
        ("device", _device(snapshot)),
        (
            "models loaded",
            ", ".join(map(_resident, snapshot.resident)) or "none",
        ),
        ("since start", _totals(snapshot)),
    ):
        table.add_row(name, escape(text))
    return table


def _resident(found: ResidentModel) -> str:
    how = ", unpacked" if found.unpacked else ""
    return f"{found.model} ({_bytes(found.size_bytes)}, {found.place}{how})"


def _process(snapshot: Snapshot) -> str:
    process = snapshot.process
    parts = [f"{process.pid}, up {_duration(process.uptime_s)}, {_bytes(process.memory_bytes)} of memory"]
    parts.append(f"{process.starts} start(s) so far")
    if process.crashes:
        at = "" if process.last_crash_at is None else f", the last before {_moment(process.last_crash_at)}"
        parts.append(f"{process.crashes} crash(es){at}")
    return "; ".join(parts)


def _lanes(snapshot: Snapshot, now: float) -> list[tuple[str, str]]:
    """Studio and job; of several lanes those of each."""
    if len(snapshot.lanes) < 2:
        whole = LaneFacts(
            lane=1, registration=snapshot.registration, session=snapshot.session, job=snapshot.job
        )
        parts = [snapshot.studio] if snapshot.studio else []
        return [("studio", "; ".join([*parts, _standing(whole, now)])), ("job", _job(snapshot.job))]
    lines = [("studio", snapshot.studio)]
    for lane in snapshot.lanes:
        lines += [(f"lane {lane.lane}", _standing(lane, now)), ("", f"job: {_job(lane.job)}")]
    return lines


def _standing(lane: LaneFacts, now: float) -> str:
    registration, session, parts = lane.registration, lane.session, []
    if registration.state == "ended":
        return f"ended: {registration.detail}"
    if registration.state == "approved":
        parts.append(f"approved as {registration.worker_id}")
    elif registration.state == "pending":
        parts.append(registration.detail or "waiting for approval")
    else:
        parts.append("not asked yet")
    if session.since_at is not None:
        parts.append(f"{session.state} for {_duration(now - session.since_at)}")
        parts.append(f"{session.reconnects} reconnect(s)")
    return "; ".join(parts)


_STAGES = {
    "files": "fetching files",
    "prepare": "preparing the request",
    "turn": "waiting for its turn at the device",
    "load": "loading the model",
}


def _job(job: JobFacts | None) -> str:
    if job is None:
        return "none in hand"
    parts = [f"{job.job_id} ({job.model})"]
    if job.steps:
        parts.append(f"step {job.step} of {job.steps}")
        if job.steps_per_s:
            parts.append(f"{job.steps_per_s:.2f} steps/s")
    else:
        parts.append(_STAGES.get(job.stage, job.stage))
    return f"{', '.join(parts)}; {_duration(job.elapsed_s)} so far"


def _outbox(snapshot: Snapshot, now: float) -> str:
    outbox = snapshot.outbox
    if not outbox.count:
        return "empty"
    text = f"{outbox.count} picture(s), {_bytes(outbox.size_bytes)}"
    if outbox.oldest_at is not None:
        text += f"; the oldest waits for {_duration(now - outbox.oldest_at)}"
    return text + (f"; uploading {outbox.uploading}" if outbox.uploading else "")


def _device(snapshot: Snapshot) -> str:
    device = snapshot.device
    if not device.name:
        return "not known yet"
    used = "" if device.used_bytes is None else f"{_bytes(device.used_bytes)} used of "
    parts = [f"{device.name}, {device.description}", f"{used}{_bytes(device.total_bytes)}"]
    if (gpu := device.gpu) is not None and (figures := _figures(gpu)):
        parts.append(figures)
    return "; ".join(parts)


def _figures(gpu: GpuFacts) -> str:
    parts = []
    if gpu.temperature_celsius is not None:
        parts.append(f"{gpu.temperature_celsius:.0f} °C")
    if gpu.power_watts is not None:
        parts.append(f"{gpu.power_watts:.0f} W")
    if gpu.utilization_ratio is not None:
        parts.append(f"in use {gpu.utilization_ratio:.0%} of the time".replace("%", " %"))
    if gpu.slowed_by:
        parts.append(f"slowed by {' and '.join(gpu.slowed_by)}")
    return ", ".join(parts)


def _totals(snapshot: Snapshot) -> str:
    jobs = ", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in snapshot.jobs.items())
    offers = snapshot.offers
    rejected = ", ".join(f"{count} {code}" for code, count in sorted(offers.rejected.items()))
    text = f"jobs: {jobs}; offers: {offers.accepted} accepted, {sum(offers.rejected.values())} rejected"
    text += f" ({rejected})" if rejected else ""
    if snapshot.uploads.retries:
        text += f"; {snapshot.uploads.retries} upload(s) tried again"
    return text


def _last_jobs(jobs: tuple[EndedJob, ...], now: float) -> Any:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="last jobs", title_justify="left", box=SIMPLE)
    for name in ("ended", "job", "model", "outcome", "seconds", "reason"):
        table.add_column(name, no_wrap=name in {"ended", "job", "outcome"}, overflow="fold")
    for job in jobs:
        stages = " ".join(
            f"{stage} {seconds:.1f}" for stage, seconds in job.stages_s.items() if seconds >= 0.05
        )
        table.add_row(
            f"{_duration(now - job.ended_at)} ago",
            escape(job.job_id),
            escape(job.model),
            job.outcome.replace("_", " "),
            stages,
            escape(job.reason or ""),
        )
    return table


def _bytes(count: float) -> str:
    from studio_worker.appliance.provisioning import show_bytes

    return show_bytes(count)


def _duration(seconds: float) -> str:
    from studio_worker.appliance.provisioning import show_duration

    return show_duration(max(0.0, seconds))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
