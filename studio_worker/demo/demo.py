"""Everything at once, for somebody who has just arrived: a local studio, the real service, a dozen pictures.

The service runs as a process of its own, by the same command that systemd starts, with its own
configuration and state folders and a notify socket that is listened to. Nothing is staged: what is shown
went over HTTP and WebSocket, through torch and back.
"""

from __future__ import annotations

import io
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from studio_worker import sample_model
from studio_worker.demo.jobs import Shown, mask, shown_jobs
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import StudioWorkerError
from studio_worker.local_studio import LocalStudio
from studio_worker.local_studio.rules import JobStatus, QueuedJob
from studio_worker.models import CliDefaults, ModelFile, ModelSource, RequiredModel

MODEL_ID = "sample"
_READY_LIMIT_S = 120.0
_JOBS_LIMIT_S = 300.0
_STOP_LIMIT_S = 60.0
_TILE_PX = 192


class DemoError(StudioWorkerError):
    """The demo did not show what it promises; the text says which part."""


def run_demo(output: Path, *, keep: bool = False) -> int:
    """Run the demo into the folder ``output``; returns the exit status, 0 when all of it worked.

    Raises:
        DemoError: a part of it did not work.
    """
    console = Console()
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for old in output.glob("*.*"):
        if old.suffix in {".png", ".webp", ".jpg"}:
            old.unlink()
    models = sample_model.WEIGHTS.parent
    # The studio approves by itself: a worker asks for the decision every 30 s, too long for a demo.
    with LocalStudio(work / "studio.sqlite3", models_dir=models, auto_approve=True) as studio:
        console.print(f"[bold]studio[/]   {studio.base_url}")
        config = write_configuration(studio, work)
        with ServiceProcess(config, work / "service.log") as service:
            _start(studio, service, console)
            jobs = _make_pictures(studio, console)
            _check(studio, jobs)
            sheet = _save(studio, jobs, output)
            console.print(_table(jobs, studio, output))
            for shown, job_id in jobs:
                if shown.must_fail:
                    console.print(f"{shown.title}: {studio.job(job_id).reason}")
            console.print(f"contact sheet: {sheet}")
            if keep:
                _keep(studio, console)
            status = service.stop(_STOP_LIMIT_S)
            if status != 0:
                raise DemoError(f"the service ended with exit status {status}; {service.last_line()}")
        console.print("[bold]service[/]  stopped cleanly, exit status 0")
    return 0


# --- the service ------------------------------------------------------------------------------------


def _start(studio: LocalStudio, service: ServiceProcess, console: Console) -> None:
    """From the process's start to an open session; shows what the service says on the way."""

    def show(line: str) -> None:
        if line.startswith("STATUS="):
            console.print(f"[bold]service[/]  {line.removeprefix('STATUS=')}")

    console.print(f"[bold]service[/]  process {service.process.pid}, log in {service.log_path}")
    service.await_message("READY=1", _READY_LIMIT_S, show)
    console.print("[bold]service[/]  READY: the model is downloaded and verified")
    _await(studio, lambda: bool(studio.workers()), 30.0, "asked to be registered")
    worker = studio.workers()[0]
    console.print(f"[bold]studio[/]   registered and approved worker {worker.name}")
    _await(studio, lambda: studio.is_online(worker.worker_id), 60.0, "opened its session")
    console.print("[bold]service[/]  session open")


def write_configuration(studio: LocalStudio, work: Path) -> Path:
    """A configuration folder for a service of this studio, with the sample model required; returns it."""
    config = work / "config"
    (config / "models.d").mkdir(parents=True)
    (config / "config.toml").write_text(
        f'[studio]\napi_base_url = "{studio.base_url}"\n'
        '[worker]\ndevice = "cpu"\n'
        f'[models]\nroot = "{work.resolve()}/models"\n'
        f'[state]\ndir = "{work.resolve()}/state"\nruntime_dir = "{work.resolve()}/run"\n'
        '[log]\nformat = "json"\n'
    )
    source = sample_source(studio)
    required = RequiredModel(id=MODEL_ID, **dict(source))
    (config / "models.d" / "sample.json").write_text(
        required.model_dump_json(by_alias=True, exclude_none=True, indent=2)
    )
    studio.register_model(MODEL_ID, source, label="Sample model (game sprites, 64 pixels)")
    return config


def sample_source(studio: LocalStudio) -> ModelSource:
    """The sample model as a studio's registry entry."""
    weights = sample_model.WEIGHTS
    file = ModelFile(
        role="model",
        url=f"{studio.base_url}/models/{weights.name}",
        filename=weights.name,
        approx_bytes=weights.stat().st_size,
        sha256=sample_model.SHA256,
    )
    defaults = CliDefaults.model_validate(sample_model.DEFAULTS)
    return ModelSource(engine="sd-cpp", files=(file,), cli_defaults=defaults)


# --- the jobs ---------------------------------------------------------------------------------------


def _make_pictures(studio: LocalStudio, console: Console) -> list[tuple[Shown, str]]:
    """Queue all jobs and wait until each is done or failed; returns them with their ids."""
    first = shown_jobs("", "")[0]
    source = sample_source(studio)
    bar = Progress(
        TextColumn("[bold]jobs[/]    "), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    with bar:
        # The first picture is also what image-to-image and inpainting start from.
        row = bar.add_task("loading torch and the model", total=None)
        start_id = _queue(studio, first, source)
        _await_end(studio, [start_id])
        if studio.job(start_id).status is not JobStatus.DONE:
            raise DemoError(f"the first job failed: {studio.job(start_id).reason}")
        init_url = studio.base_url + studio.add_picture(studio.result(start_id))
        mask_url = studio.base_url + studio.add_picture(mask())
        rest = shown_jobs(init_url, mask_url)[1:]
        ids = [start_id, *(_queue(studio, shown, source) for shown in rest)]
        shown_by_id = dict(zip(ids, [first, *rest], strict=True))
        bar.update(row, total=len(ids), completed=1, description=first.title)
        _await_end(
            studio,
            ids,
            lambda ended: bar.update(
                row, completed=len(ended), description=shown_by_id[ended[-1]].title if ended else ""
            ),
        )
    return [(shown, job_id) for job_id, shown in shown_by_id.items()]


def _queue(studio: LocalStudio, shown: Shown, source: ModelSource) -> str:
    return studio.queue_job(
        model=MODEL_ID,
        task={"kind": "image", "prompt": shown.prompt, **shown.task},
        model_source=source,
        asset_name=shown.title,
    )


def _await(studio: LocalStudio, condition: Callable[[], bool], limit_s: float, what: str) -> None:
    try:
        studio.wait_for(condition, limit_s)
    except TimeoutError:
        raise DemoError(f"the worker had not {what} within {limit_s:g} s") from None


def _await_end(
    studio: LocalStudio, ids: list[str], on_end: Callable[[list[str]], None] | None = None
) -> None:
    def all_ended() -> bool:
        ended = [i for i in ids if studio.job(i).status in {JobStatus.DONE, JobStatus.FAILED}]
        if on_end is not None:
            on_end(ended)
        return len(ended) == len(ids)

    _await(studio, all_ended, _JOBS_LIMIT_S, "finished its jobs")


# --- what came of them ------------------------------------------------------------------------------


def _check(studio: LocalStudio, jobs: list[tuple[Shown, str]]) -> None:
    """Every job ended as it must.

    Raises:
        DemoError: one did not.
    """
    for shown, job_id in jobs:
        job = studio.job(job_id)
        if shown.must_fail:
            if job.status is not JobStatus.FAILED or shown.must_fail not in (job.reason or ""):
                raise DemoError(f"job {shown.title!r} had to fail with {shown.must_fail!r}: {job.reason}")
        elif job.status is not JobStatus.DONE:
            raise DemoError(f"job {shown.title!r} failed: {job.reason}")
    if studio.result(jobs[0][1]) != studio.result(jobs[1][1]):
        raise DemoError("the seeded pair came out different")


def _file_name(index: int, shown: Shown, job: QueuedJob) -> str:
    slug = "-".join(shown.title.replace(",", "").replace("+", "p").split())
    return f"{index:02}-{slug}.{job.task.get('ext', 'webp')}"


def _save(studio: LocalStudio, jobs: list[tuple[Shown, str]], output: Path) -> Path:
    """The pictures and a contact sheet of them; returns the sheet's path."""
    tiles = []
    for index, (shown, job_id) in enumerate(jobs, 1):
        job = studio.job(job_id)
        if job.status is JobStatus.DONE:
            data = studio.result(job_id)
            (output / _file_name(index, shown, job)).write_bytes(data)
            tiles.append((shown, Image.open(io.BytesIO(data)).convert("RGB")))
    columns, caption = 5, 24
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * _TILE_PX, rows * (_TILE_PX + caption)), "#16181d")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for place, (shown, picture) in enumerate(tiles):
        left, top = place % columns * _TILE_PX, place // columns * (_TILE_PX + caption)
        scale = (_TILE_PX - 12) / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        tile = picture.resize(size, Image.Resampling.NEAREST)
        sheet.paste(tile, (left + (_TILE_PX - size[0]) // 2, top + (_TILE_PX - size[1]) // 2))
        draw.text((left + 8, top + _TILE_PX), shown.title, fill="#c8ccd4", font=font)
    path = output / "contact-sheet.png"
    sheet.save(path)
    return path


def _table(jobs: list[tuple[Shown, str]], studio: LocalStudio, output: Path) -> Table:
    table = Table(title="pictures")
    for name in ("job", "prompt", "seconds", "size", "file"):
        table.add_column(name, no_wrap=name != "prompt")
    for index, (shown, job_id) in enumerate(jobs, 1):
        job = studio.job(job_id)
        if job.status is JobStatus.FAILED:
            table.add_row(shown.title, shown.prompt, "", "", "[yellow]failed, as it must[/]")
            continue
        path = output / _file_name(index, shown, job)
        with Image.open(path) as picture:
            size = f"{picture.width} x {picture.height}"
        seconds = (job.finished_at or 0.0) - (job.started_at or 0.0)
        table.add_row(shown.title, shown.prompt, f"{seconds:.2f}", size, path.name)
    return table


def _keep(studio: LocalStudio, console: Console) -> None:
    """Studio and worker stay until ctrl-C or SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    console.print(f"[bold]page[/]     {studio.base_url}/   (ctrl-C ends it)")
    ended.wait()
