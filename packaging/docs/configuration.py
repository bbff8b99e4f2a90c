"""The shipped config.toml: every setting as it is declared, with its text above it and its default."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from studio_worker.config.declaration import Declared
from studio_worker.config.settings import DECLARED

WIDTH = 118

HEAD = """\
# studio-worker's configuration. Every key is shown with its default; leave this file as it is and put
# your own values into /etc/studio-worker/conf.d/*.toml (read in name order, later files win).
# The environment wins over every file: STUDIO_WORKER_<SECTION>__<KEY>, e.g. STUDIO_WORKER_LOG__LEVEL=debug.
# `studio-worker check-config` tells what is wrong, with file and line. `systemctl reload studio-worker`
# applies what has changed here and in models.d while the service runs, except for the keys marked [restart].
"""


def config_file() -> str:
    lines = [HEAD]
    for section, settings in sections():
        lines.append(f"[{section}]")
        for each in settings:
            lines += [f"# {line}" for line in explained(each)]
            if each.example is None:
                lines.append(f"{each.name} = {written(each.default)}")
            else:
                lines.append(f"#{each.name} = {written(each.example)}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def sections() -> Iterator[tuple[str, list[Declared]]]:
    """Every section with its settings, in order."""
    for section, settings in groupby(DECLARED.values(), lambda each: each.section):
        yield section, list(settings)


def explained(setting: Declared) -> list[str]:
    """What the operator reads of it, as lines."""
    mark = "" if setting.is_live else "[restart] "
    return textwrap.wrap(mark + setting.text, WIDTH - 2, break_long_words=False, break_on_hyphens=False)


def written(value: Any) -> str:
    """``value`` as TOML has it."""
    if isinstance(value, dict):
        pairs = ", ".join(f"{written(key)} = {written(each)}" for key, each in value.items())
        return f"{{ {pairs} }}"
    return json.dumps(value, default=str)  # JSON's strings, numbers and truth values are TOML's too
