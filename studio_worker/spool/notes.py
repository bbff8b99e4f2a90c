"""Small notes in the state folder, as JSON. One that cannot be read back stops nothing: it is logged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

REMEMBERED_JOBS = 200
"""A list of jobs stays so short."""


def read_note(path: Path) -> dict[str, Any] | None:
    """What the note says; ``None`` where there is none, or none that can be used."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        log.warning("spool file is unreadable and ignored", extra={"op": "spool", "path": str(path)})
        return None
    return value if isinstance(value, dict) else None
