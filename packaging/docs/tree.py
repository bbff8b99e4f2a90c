"""The program's commands and options, as its own help has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from studio_worker.cli import app

NAME = "studio-worker"


def root() -> Any:
    return typer.main.get_command(app)


def commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its words; some have commands of their own besides."""
    if subs := getattr(command, "commands", None):
        if path and command.invoke_without_command:
            yield path, command
        for name, sub in subs.items():
            yield from commands(sub, f"{path} {name}".strip())
    else:
        yield path, command


def options(command: Any) -> list[Any]:
    return [param for param in command.params if param.param_type_name != "argument"]


def takes_value(param: Any) -> bool:
    return not getattr(param, "is_flag", False)


def value_name(param: Any) -> str:
    return str(param.metavar or (param.name or "").upper())
