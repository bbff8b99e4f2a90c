"""The options that several commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from studio_worker.plain import plain

ConfigDir = Annotated[
    Path, typer.Option("--config", metavar="DIR", help="Configuration folder.", show_default=True)
]


def table_console() -> Any:
    """What prints tables. In a pipe nothing is folded, so that names and reasons can be searched for."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 1000)


def show(*tables: Any) -> None:
    """Print tables; in a pipe without the blanks that fill their last column."""
    console = table_console()
    if sys.stdout.isatty():
        for table in tables:
            console.print(table)
        return
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def say(text: str) -> None:
    """Print what may hold words from outside."""
    typer.echo(plain(text))


def cell(text: str) -> str:
    """Such words in a table: neither control characters nor markup."""
    from rich.markup import escape

    return escape(plain(text))


def as_instance(number: int | None) -> int | None:
    """The settings of this process are those that studio-worker@.service gives to instance ``number``."""
    if number is not None:
        os.environ["STUDIO_WORKER_STATE__DIR"] = f"/var/lib/studio-worker/instance-{number}"
        os.environ["STUDIO_WORKER_STATE__RUNTIME_DIR"] = f"/run/studio-worker-{number}"
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
        os.environ.setdefault("STUDIO_WORKER_WORKER__DEVICE", "cuda")
    return number


Instance = Annotated[
    int | None,
    typer.Option(
        "--instance", metavar="N", min=0, callback=as_instance, help="The service studio-worker@N is meant."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
