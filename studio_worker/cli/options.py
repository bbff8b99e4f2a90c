"""The options that several commands share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from studio_worker.engine.parameters import MAX_PIXELS, MAX_SIDE_PX, MIN_SIDE_PX
from studio_worker.errors import ConfigError
from studio_worker.files import others_can_read
from studio_worker.plain import plain

# No path is looked at by typer (readable=False), here or elsewhere: whoever opens it says what is wrong.
ConfigDir = Annotated[
    Path,
    typer.Option("--config", metavar="DIR", help="Configuration folder.", show_default=True, readable=False),
]


def show(*tables: Any) -> None:
    """Print tables. In a pipe nothing is folded, so that names and reasons can be searched for, and there are
    no blanks that fill the last column.
    """
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else 1000)
    with contextlib.nullcontext() if is_terminal else console.capture() as captured:
        for table in tables:
            console.print(table)
    if captured is not None:
        for line in captured.get().splitlines():
            typer.echo(line.rstrip())


def say(text: str) -> None:
    """Print what may hold words from outside."""
    typer.echo(plain(text))


def complain(text: str) -> None:
    """Tell on stderr what is wrong while the command goes on, as :func:`main` tells what ends it."""
    typer.echo(f"studio-worker: {plain(text)}", err=True)


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


def pixels(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of a ``--size``."""
    if size is None:
        return None, None
    width, by, height = size.lower().partition("x")
    try:
        sides = int(width), int(height if by else width)
    except ValueError:
        sides = -1, -1
    if min(sides) < 0:
        raise typer.BadParameter(f"{size}: write e.g. 1024x768", param_hint="--size")
    if min(sides) < MIN_SIDE_PX or max(sides) > MAX_SIDE_PX:
        raise typer.BadParameter(
            f"{size}: each side is {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels", param_hint="--size"
        )
    if sides[0] * sides[1] > MAX_PIXELS:
        raise typer.BadParameter(f"{size}: at most {MAX_PIXELS} pixels in all", param_hint="--size")
    return sides


def one_of(names: Collection[str]) -> Callable[[str | None], str | None]:
    """For an option that takes one of ``names``, or is left out."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(names)}")
        return value

    return check


def read_token(path: Path) -> str:
    """What a ``--token-file`` holds. Raises ConfigError where it cannot be read, or others can read it."""
    try:
        if others_can_read(path):
            raise ConfigError("others can read it", source=str(path), cure=f"chmod 600 {path}")
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", source=str(path), cure="name another --token-file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "is not UTF-8 text", source=str(path), cure="make one with: openssl rand -hex 32"
        ) from error
    if not (token.isascii() and token.isprintable()):  # no header could carry it
        raise ConfigError(
            "holds more than one line of plain letters and digits",
            source=str(path),
            cure="make one with: openssl rand -hex 32",
        )
    return token


Negative = Annotated[str, typer.Option(help="What the picture must not show.")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels, or one number for a square.")]
Instance = Annotated[
    int | None,
    typer.Option(
        "--instance", metavar="N", min=0, callback=as_instance, help="The service studio-worker@N is meant."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
