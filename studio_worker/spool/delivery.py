"""A finished picture on its way to the studio, and the note that keeps it over a restart."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Delivery:
    """One finished picture on its way to the studio.

    ``prompt`` travels with the upload, never to a log; ``timings_s`` are the stages so far, in seconds;
    ``kept_since_s`` is on the outbox's own clock, ``finished_at`` Unix time; ``lane`` is whose worker
    delivers it. Without ``data_path`` the picture is in memory alone.
    """

    job_id: str
    model: str
    ext: str
    prompt: str
    meta: Mapping[str, Any]
    data_path: Path | None
    finished_at: float
    timings_s: Mapping[str, float] = field(default_factory=dict)
    kept_since_s: float = 0.0
    lane: int = 1
    in_memory: bytes = field(default=b"", repr=False)

    def opened(self) -> BinaryIO:
        """The picture, to be read piece by piece. Raises OSError where it cannot be read."""
        return io.BytesIO(self.in_memory) if self.data_path is None else self.data_path.open("rb")

    def read(self) -> bytes:
        """The whole picture. Raises OSError where it cannot be read."""
        with self.opened() as picture:
            return picture.read()

    def size_bytes(self) -> int:
        """How long the picture is; 0 where it is gone."""
        if self.data_path is None:
            return len(self.in_memory)
        with contextlib.suppress(OSError):
            return self.data_path.stat().st_size
        return 0

    def note(self) -> bytes:
        """Everything but the picture, as JSON."""
        return json.dumps({name: getattr(self, name) for name in _NOTED}).encode()

    @staticmethod
    def read_note(text: str, data_path: Path) -> Delivery:
        """What :meth:`note` wrote, its picture in ``data_path``.

        Raises:
            ValueError, TypeError: it is damaged.
        """
        delivery = _DELIVERY.validate_python({**json.loads(text), "data_path": data_path})
        return replace(delivery, in_memory=b"")


_NOTED = ("job_id", "model", "ext", "prompt", "meta", "finished_at", "timings_s", "kept_since_s", "lane")
_DELIVERY = TypeAdapter(Delivery)
