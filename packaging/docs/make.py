"""Writes config.toml, man pages and shell completions from the program and the settings that it declares.

``make docs`` runs it; a test sees that what is committed is what it writes, so that neither can drift.
"""

from __future__ import annotations

import sys
from pathlib import Path

from completions import Completions
from configuration import config_file
from man import config_page, program_page
from tree import NAME

PACKAGING = Path(__file__).parents[1]


def documents() -> dict[Path, str]:
    """Every file that is written, by its path."""
    completions = Completions()
    return {
        PACKAGING / "config.toml": config_file(),
        PACKAGING / "man" / "studio-worker.1": program_page(),
        PACKAGING / "man" / "studio-worker-config.5": config_page(),
        PACKAGING / "completions" / "bash" / NAME: completions.bash(),
        PACKAGING / "completions" / "zsh" / f"_{NAME}": completions.zsh(),
        PACKAGING / "completions" / "fish" / f"{NAME}.fish": completions.fish(),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path, file=sys.stderr)
