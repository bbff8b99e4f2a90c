"""The command that queues pictures at a studio of one's own, for scripts: one line a job, an exit status."""

from __future__ import annotations

import errno
import getpass
import random
from pathlib import Path
from typing import Annotated

import typer

from studio_worker.cli.options import Negative, Size, complain, one_of, pixels, read_token, say
from studio_worker.engine.parameters import MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from studio_worker.files import write_problem

ADDRESS = "http://127.0.0.1:8765"
"""Where ``studio-worker local-studio`` listens."""

EXTS = ("webp", "png", "jpg", "jpeg")
"""Of the formats that the engines write."""


def _known_sampler(name: str | None) -> str | None:
    if name is None:
        return None
    from studio_worker.engine.sampling.samplers import SAMPLERS  # with numpy, which no other option needs

    return one_of(SAMPLERS)(name)


_Model = Annotated[str, typer.Option("--model", "-m", metavar="ID", help="A model of the studio, by its id.")]
_Count = Annotated[int, typer.Option("--count", "-n", min=1, max=1000, help="How many pictures.")]
_Wait = Annotated[bool, typer.Option("--wait", help="Wait until all are made, or have failed.")]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Wait, and put the pictures into this folder.", readable=False
    ),
]
_Timeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0, help="Wait no longer than this in all; 0 waits for ever."),
]
_Priority = Annotated[int, typer.Option(min=-100, max=100, help="The highest goes first.")]
_Submitter = Annotated[
    str | None, typer.Option(metavar="NAME", help="Who takes turns with others; default: your login name.")
]
_Studio = Annotated[str, typer.Option(metavar="URL", help="The studio's address.")]
_TokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File with the studio's token.", readable=False)
]
_Seed = Annotated[
    int | None, typer.Option(min=0, max=MAX_SEED, help="Of the first picture; the others count on from it.")
]
_Steps = Annotated[int | None, typer.Option(min=1, max=MAX_STEPS, help="Denoising steps.")]
_Cfg = Annotated[
    float | None,
    typer.Option(min=0, max=MAX_GUIDANCE, help="Guidance: how closely the prompt is followed."),
]
_Sampler = Annotated[
    str | None,
    typer.Option(metavar="NAME", callback=_known_sampler, help="euler, euler_a, heun, dpm++2m, lcm, …"),
]
_Ext = Annotated[
    str, typer.Option("--format", metavar="EXT", callback=one_of(EXTS), help="webp, png, jpg or jpeg.")
]


def submit(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.")],
    model: _Model,
    count: _Count = 1,
    wait: _Wait = False,
    output: _Output = None,
    timeout: _Timeout = 0,
    priority: _Priority = 0,
    submitter: _Submitter = None,
    studio: _Studio = ADDRESS,
    token_file: _TokenFile = None,
    negative: Negative = "",
    seed: _Seed = None,
    steps: _Steps = None,
    size: Size = None,
    cfg: _Cfg = None,
    sampler: _Sampler = None,
    ext: _Ext = "webp",
) -> None:
    """Queue pictures at a studio of your own.

    One line a job: its id, then "queued", "done" (with the file's name), "failed" (with the reason) or
    "unknown" (it may be in the studio). What is waited for is named on stderr when it is queued, and a stop
    names on stdout what is still there. A studio that goes away is waited for, two minutes at most; no order
    becomes two jobs. Exit status 0 where all are queued, or made; 1 where one failed or was refused; 2 where
    an option is wrong; 74 where a picture cannot be written; 75 where the studio cannot be reached or the
    time is up: the last lines say which jobs are still there; 77 where it wants another token; 78 where there
    is no studio at the address, or the token's file is not usable.
    """
    from studio_worker.studio.http.orders import Orders
    from studio_worker.studio.http.watch import Watch

    if output is not None:
        _prepare(output)
    width, height = pixels(size)
    task = {
        "prompt": prompt,
        "negativePrompt": negative or None,
        "width": width,
        "height": height,
        "steps": steps,
        "cfgScale": cfg,
        "samplingMethod": sampler,
        "ext": ext,
    }
    who = _login_name() if submitter is None else submitter
    job = {"model": model, "priority": priority, "submitter": who}
    orders = Orders(studio, "" if token_file is None else read_token(token_file), str(token_file or ""))
    seeds = _seeds(seed, count)
    watch = Watch(orders, output, timeout_s=timeout, tell=say, complain=complain)
    is_waiting = wait or output is not None
    with watch.telling():
        for each in seeds:
            order = watch.queue(job | {"task": task | {"seed": each}})
            if is_waiting:  # whatever becomes of this command, nobody need queue the job again
                typer.echo(f"{order.job_id} queued", err=True)
        if is_waiting:
            watch.wait()
    raise typer.Exit(watch.exit_status)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = write_problem(folder)
    except OSError as error:
        problem = error.strerror
    if problem:
        raise OSError(errno.EIO, f"{problem}; name another -o DIR", str(folder))


def _seeds(first: int | None, count: int) -> list[int]:
    """Chosen here where none is given, so that every picture can be made again."""
    return [random.getrandbits(32) if first is None else (first + n) % (MAX_SEED + 1) for n in range(count)]


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return ""
