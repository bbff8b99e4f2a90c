"""The command that proves on this box's GPU what only a GPU can prove."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def gpu_check(
    device: Annotated[
        str, typer.Option(help="cuda or cuda:N; cpu rehearses everything at small sizes.")
    ] = "cuda",
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Everything that was found, as JSON.", readable=False
        ),
    ] = Path("gpu-check.json"),
    only: Annotated[
        str, typer.Option(metavar="PATTERN", help="Rows whose names match, e.g. 'flux*' or '*Q4_K'.")
    ] = "*",
    minutes: Annotated[
        float, typer.Option(min=0.5, help="Rows that are left after so many are left out.")
    ] = 8.0,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For files of 14 GB; by default a folder on a disk that has room.",
            readable=False,
        ),
    ] = None,
) -> None:
    """Prove on this box's GPU what only a GPU can prove: a table, and a JSON file.

    Each row goes on after one that failed. Exit status 1 where something failed, 69 without a usable device.
    """
    from studio_worker.gpu_check.check import run_check

    raise typer.Exit(
        run_check(
            device,
            output,
            only=only,
            minutes=minutes,
            work=work,
            show=lambda line: print(line, flush=True),
        )
    )
