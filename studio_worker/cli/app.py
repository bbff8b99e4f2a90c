"""The commands. Each is a thin shell over the room that does the work; none imports torch by itself."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from studio_worker import __version__, config
from studio_worker.box import process
from studio_worker.cli.control import pause, resume, status
from studio_worker.cli.doctor import check_config, doctor
from studio_worker.cli.generate import generate
from studio_worker.cli.gpu_check import gpu_check
from studio_worker.cli.local_studio import local_studio_app
from studio_worker.cli.models import models_app
from studio_worker.cli.options import ConfigDir
from studio_worker.cli.register import register
from studio_worker.cli.submit import submit
from studio_worker.errors import StudioWorkerError
from studio_worker.files import DISK_TROUBLES
from studio_worker.plain import plain

app = typer.Typer(
    name="studio-worker",
    help="Takes image jobs from a studio, makes the pictures with torch, delivers them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(models_app, name="models")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (generate, submit, status, pause, resume, doctor):
    app.command()(command)
app.command("check-config")(check_config)
app.command("gpu-check")(gpu_check)


def main() -> None:
    """Entry point: an operator's mistake is one line on stderr and an exit status, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal or pipe that is not UTF-8, or a name that is none, must not end a command half-way.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="studio-worker")  # however it is started; completion goes by it
    except StudioWorkerError as error:
        print(f"studio-worker: {plain(str(error))}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        # Else neither one file nor a full disk behind the output: a fault of ours, its traceback is wanted.
        if error.filename is None and error.errno not in DISK_TROUBLES:
            raise
        print(f"studio-worker: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        sys.exit(os.EX_IOERR)


@app.command()
def run(directory: ConfigDir = config.DEFAULT_DIR) -> None:
    """Run the service (what systemd starts)."""
    from studio_worker import service

    process.prepare()
    raise typer.Exit(service.run(directory))


app.command()(register)
app.add_typer(local_studio_app, name="local-studio")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the pictures.", readable=False)
    ] = Path("demo"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave studio and worker running and print the page's address.")
    ] = False,
) -> None:
    """Show everything at once: a local studio, the real service, a dozen pictures by torch on the CPU."""
    from studio_worker.demo import run_demo

    raise typer.Exit(run_demo(output, keep=keep))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"studio-worker {__version__}")
