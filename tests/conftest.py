"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import studio_worker.engine  # noqa: F401  (before torch: it sets how torch's threads wait)
from studio_worker import sample_model
from studio_worker.local_studio import LocalStudio


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    """A real local studio on a free loopback port, serving the sample model."""
    with LocalStudio(tmp_path / "studio.sqlite3", models_dir=sample_model.WEIGHTS.parent) as running:
        yield running
