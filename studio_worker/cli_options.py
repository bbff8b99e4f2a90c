"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigDir = Annotated[
    Path, typer.Option("--config", metavar="DIR", help="Configuration folder.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
