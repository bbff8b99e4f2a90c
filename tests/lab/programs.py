"""Programs of others that some tests need, and that a machine need not have."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str) -> str:
    """Where it is. Without it the test is skipped; FARM=1, as ``make test-farm`` says, promises it."""
    path = shutil.which(name)
    if path is not None:
        return path
    if os.environ.get("FARM"):
        pytest.fail(f"no {name} here")
    pytest.skip(f"no {name} here (make test-farm fetches it)")
